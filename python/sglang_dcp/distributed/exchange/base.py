"""The interface of an exchange of partial attention outputs over a DCP group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Optional, Protocol

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import PeerGroup, exchange_with_peers
from sglang_dcp.distributed.exchange.fallbacks import Fallbacks
from sglang_dcp.ops.lse_merge import PARTIAL_DTYPES
from sglang_dcp.ops.partials import interleave_heads


class ExchangeGroup(PeerGroup, Protocol):
    """The part of SGLang's ``GroupCoordinator`` that an exchange uses."""

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor: ...


@dataclass(frozen=True)
class WorkspaceSpec:
    """The largest decode step, for exchanges that allocate memory before the first one.

    Attributes
    ----------
    tokens : most tokens of a batch
    heads : local query heads of a rank
    row_bytes : size of one head of the partial output or of the queries, the larger one
    timeout_s : seconds to wait for a peer before the process ends with an error
    """

    tokens: int = 256
    heads: int = 32
    row_bytes: int = 256
    timeout_s: float = 300.0


class Exchange(ABC):
    """Turns partial outputs of all heads into merged outputs of a rank's local heads.

    Rank order is head order: rank p of N has heads [p * heads / N, (p + 1) * heads / N).
    The number of tokens must be the same on every rank. With zero tokens no rank
    communicates. At N == 1 inputs come back untouched. Safe in CUDA-graph capture:
    buffers are allocated for each call, from the graph's pool while capturing.

    Attributes
    ----------
    name : str
        The value of `--dcp-comm-backend` that chooses it.
    summary : str
        What the exchange does, for `--help`.
    max_ranks : int, optional
        Most ranks of a group; None for any number.
    needs_gpu : str
        Why the exchange does not run on a CPU; "" if it does.
    fallback_reasons : tuple of str
        Reasons that `fallbacks` may count.
    fallbacks : Fallbacks
        Calls that another exchange served.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    max_ranks: ClassVar[Optional[int]] = None
    needs_gpu: ClassVar[str] = ""
    fallback_reasons: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, group: ExchangeGroup, spec: Optional[WorkspaceSpec] = None
    ) -> None:
        self.group = group
        self.fallbacks = Fallbacks()

    @property
    def in_use(self) -> str:
        """Return the name of the exchange that serves decode: `name`, or its fallback."""
        return self.name

    @property
    def standing_bytes(self) -> int:
        """Return the bytes of GPU memory that the exchange holds between its calls."""
        return 0

    def gather_heads(self, q: Tensor) -> Tensor:
        """All-gather local heads [tokens, h, D] to all heads [tokens, h * N, D].

        The heads are in rank order. Any dtype.
        """
        if self.group.world_size == 1:
            return q
        if q.shape[0] == 0:
            return q.new_empty(0, q.shape[1] * self.group.world_size, q.shape[2])
        # Along dim 0, SGLang makes no copy after the all-gather. Along dim 1 it does.
        gathered = self.group.all_gather(q.contiguous(), dim=0)
        return interleave_heads(gathered.view(self.group.world_size, *q.shape))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All-gather [n, D] to [N * n, D] in rank order; n is the same on every rank."""
        if self.group.world_size == 1 or not len(rows):
            return rows
        return self.group.all_gather(rows.contiguous(), dim=0)

    def swap_rows(self, sent: Tensor, received: Tensor) -> None:
        """Send slice j of [N - 1, n, D] to peer j, and receive slice j from it.

        Peer j is the j-th rank of the group when this rank is left out. n is the same on
        every rank. Both tensors are contiguous and do not overlap. Any dtype.
        """
        if sent.numel():
            exchange_with_peers(self.group, received.flatten(0, 1), sent.flatten(0, 1))

    def reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        *,
        is_lse_base_on_e: bool,
        empty_rows: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor]:
        """Merge the partial outputs of all ranks, each over the rank's local keys.

        Parameters
        ----------
        partial_out : [tokens, h * N, D], fp16, bf16 or fp32, any strides
        lse : [tokens, h * N], fp32, any strides; -inf where this rank has no key
        is_lse_base_on_e : True if the LSE is a natural log, False if it is base 2
        empty_rows : [tokens] bool, true where this rank has no key, whatever ``lse``
            holds; None if ``lse`` already marks these rows

        Returns
        -------
        out : [tokens, h, D] of local heads in ``partial_out.dtype``, contiguous
        lse : [tokens, h] fp32 of the merged outputs, in the same log base

        Raises
        ------
        ValueError : shapes do not match, or N does not divide the heads
        TypeError : other dtypes
        """
        if self.group.world_size == 1:
            return partial_out, mask_empty_rows(lse, empty_rows)
        self._check(partial_out, lse)
        if partial_out.shape[0] == 0:
            out = partial_out.new_empty(self._local_shape(partial_out))
            return out, lse.new_empty(out.shape[:-1])
        return self._reduce(partial_out, lse, empty_rows, is_lse_base_on_e)

    @abstractmethod
    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
    ) -> tuple[Tensor, Tensor]:
        """Do ``reduce`` for N > 1, checked arguments and at least one token."""

    def _local_shape(self, partial_out: Tensor) -> tuple[int, int, int]:
        tokens, heads, head_dim = partial_out.shape
        return tokens, heads // self.group.world_size, head_dim

    def _local_heads(self, partial_out: Tensor) -> slice:
        local_heads = self._local_shape(partial_out)[1]
        first = self.group.rank_in_group * local_heads
        return slice(first, first + local_heads)

    def _check(self, partial_out: Tensor, lse: Tensor) -> None:
        if partial_out.dim() != 3 or lse.shape != partial_out.shape[:-1]:
            raise ValueError(
                "partial_out must be [tokens, heads, head_dim] and lse [tokens, heads]: "
                f"got {tuple(partial_out.shape)} and {tuple(lse.shape)}"
            )
        heads, world_size = partial_out.shape[1], self.group.world_size
        if heads % world_size:
            raise ValueError(
                f"{heads} heads cannot be divided among {world_size} DCP ranks: "
                "choose a --dcp-size that divides the heads of an attention-TP shard"
            )
        if partial_out.dtype not in PARTIAL_DTYPES or lse.dtype != torch.float32:
            raise TypeError(
                "partial_out must be float16, bfloat16 or float32 and lse float32: "
                f"got {partial_out.dtype} and {lse.dtype}"
            )


def mask_empty_rows(lse: Tensor, empty_rows: Optional[Tensor]) -> Tensor:
    """Set ``lse`` [tokens, heads] to -inf in the rows that ``empty_rows`` [tokens] marks.

    The output needs no mask: no merge reads the output of an empty shard.
    """
    if empty_rows is None:
        return lse
    return lse.masked_fill(empty_rows[:, None], float("-inf"))
