"""What every exchange of partial attention outputs over a KVP group has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Optional, Protocol, overload

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import PeerGroup
from sglang_dcp.layers.merge import PARTIAL_DTYPES, Merged
from sglang_dcp.layers.merge_peers import interleave_heads


class ExchangeGroup(PeerGroup, Protocol):
    """The part of SGLang's ``GroupCoordinator`` that an exchange uses."""

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor: ...


@dataclass(frozen=True)
class WorkspaceSpec:
    """The largest decode step, for exchanges that allocate before the first one.

    Attributes
    ----------
    tokens : of a batch
    heads : own query heads of a rank
    row_bytes : of one head of the partial output or of the queries, the larger
    timeout_s : how long to wait for a peer before the process ends with an error
    """

    tokens: int = 256
    heads: int = 32
    row_bytes: int = 256
    timeout_s: float = 300.0


class Exchange(ABC):
    """Turn partial outputs of all heads into merged outputs of a rank's own heads.

    Rank order is head order: rank p of N owns heads [p * heads / N, (p + 1) * heads / N).
    The number of tokens must be the same on every rank; for zero tokens no rank
    communicates. At N == 1 inputs come back untouched. Safe in CUDA-graph capture:
    buffers are allocated per call, from the graph's pool while capturing.
    """

    def __init__(
        self, group: ExchangeGroup, spec: Optional[WorkspaceSpec] = None
    ) -> None:
        self.group = group

    def gather_heads(self, q: Tensor) -> Tensor:
        """All-gather own heads [tokens, h, D] to all heads [tokens, h * N, D]."""
        if self.group.world_size == 1:
            return q
        if q.shape[0] == 0:
            return q.new_empty(0, q.shape[1] * self.group.world_size, q.shape[2])
        # Over dim 0 SGLang copies nothing after the all-gather, over dim 1 it does.
        gathered = self.group.all_gather(q.contiguous(), dim=0)
        return interleave_heads(gathered.view(self.group.world_size, *q.shape))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All-gather [n, D], the same n on every rank, to [N * n, D] in rank order."""
        if self.group.world_size == 1 or not len(rows):
            return rows
        return self.group.all_gather(rows.contiguous(), dim=0)

    @overload
    def reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        *,
        is_lse_base_on_e: bool,
        empty_rows: Optional[Tensor] = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        *,
        is_lse_base_on_e: bool,
        empty_rows: Optional[Tensor] = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        *,
        is_lse_base_on_e: bool,
        empty_rows: Optional[Tensor] = None,
        return_lse: bool,
    ) -> Merged: ...

    def reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        *,
        is_lse_base_on_e: bool,
        empty_rows: Optional[Tensor] = None,
        return_lse: bool = False,
    ) -> Merged:
        """Merge the ranks' partial outputs, each over its own keys.

        Parameters
        ----------
        partial_out : [tokens, h * N, D], fp16, bf16 or fp32, any strides
        lse : [tokens, h * N], fp32, any strides; -inf where this rank has no key
        is_lse_base_on_e : LSE is a natural log (True) or a base-2 log (False)
        empty_rows : [tokens] bool, where this rank has no key whatever `lse` holds
        return_lse : also return the merged LSE

        Returns
        -------
        out : [tokens, h, D] of own heads in ``partial_out.dtype``, contiguous
        lse : [tokens, h] fp32 in the same base, only with ``return_lse``

        Raises
        ------
        ValueError : shapes do not match, or N does not divide the heads
        TypeError : other dtypes
        """
        if self.group.world_size == 1:
            lse = mask_empty_rows(lse, empty_rows)
            return (partial_out, lse) if return_lse else partial_out
        self._check(partial_out, lse)
        if partial_out.shape[0] == 0:
            out = partial_out.new_empty(self._own_shape(partial_out))
            own_lse = lse.new_empty(out.shape[:-1])
            return (out, own_lse) if return_lse else out
        return self._reduce(partial_out, lse, empty_rows, is_lse_base_on_e, return_lse)

    @abstractmethod
    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
        return_lse: bool,
    ) -> Merged:
        """``reduce`` for N > 1, checked arguments and at least one token."""

    def _own_shape(self, partial_out: Tensor) -> tuple[int, int, int]:
        tokens, heads, head_dim = partial_out.shape
        return tokens, heads // self.group.world_size, head_dim

    def _own_heads(self, partial_out: Tensor) -> slice:
        own_heads = self._own_shape(partial_out)[1]
        first = self.group.rank_in_group * own_heads
        return slice(first, first + own_heads)

    def _check(self, partial_out: Tensor, lse: Tensor) -> None:
        if partial_out.dim() != 3 or lse.shape != partial_out.shape[:-1]:
            raise ValueError(
                "partial_out must be [tokens, heads, head_dim] and lse [tokens, heads]: "
                f"got {tuple(partial_out.shape)} and {tuple(lse.shape)}"
            )
        heads, world_size = partial_out.shape[1], self.group.world_size
        if heads % world_size:
            raise ValueError(
                f"{heads} heads cannot be divided among {world_size} KVP ranks: "
                "choose a --dcp-size that divides the heads of an attention-TP shard"
            )
        if partial_out.dtype not in PARTIAL_DTYPES or lse.dtype != torch.float32:
            raise TypeError(
                "partial_out must be float16, bfloat16 or float32 and lse float32: "
                f"got {partial_out.dtype} and {lse.dtype}"
            )


def mask_empty_rows(lse: Tensor, empty_rows: Optional[Tensor]) -> Tensor:
    """``lse`` [tokens, heads] with -inf in the rows that ``empty_rows`` [tokens] names.

    That alone decides: no merge reads the output of an empty shard.
    """
    if empty_rows is None:
        return lse
    return lse.masked_fill(empty_rows[:, None], float("-inf"))
