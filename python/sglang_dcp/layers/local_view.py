"""The batch as one rank's pool sees it: local lengths, local slots, local table.

One kernel launch a forward on CUDA (`local_view_triton`), plain torch on CPU
(`local_view_ref`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional

import torch

from sglang_dcp.layers.layout import local_lens
from sglang_dcp.layers.local_view_ref import localise_ref

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class LocalView:
    """One forward, localised.

    Attributes
    ----------
    batch : ForwardBatch
        Copy of SGLang's (in graph replay a namespace of the same fields) with
        `seq_lens`, `seq_lens_cpu`, `seq_lens_sum` and `out_cache_loc` of this rank's
        pool. In extend the lengths are the prefix's.
    reads_keys : bool
        Whether any rank reads keys from its pool; the same on all ranks.
    empty_rows : Tensor [tokens] bool
        Queries whose request has no key on this rank.
    """

    batch: ForwardBatch
    reads_keys: bool
    empty_rows: torch.Tensor


class Shard(NamedTuple):
    """A rank's share of SGLang's slot table."""

    table: torch.Tensor  # [requests, positions], logical slots
    local_table: torch.Tensor  # [requests, ceil(positions / dcp_size)]
    dcp_size: int
    kvp_rank: int
    page_size: int  # of the rank's pool


class LocalTensors(NamedTuple):
    """What a localisation writes beside the local table; captured decode reads these."""

    seq_lens: torch.Tensor  # [requests], int64; in extend as SGLang's prefix lengths
    out_cache_loc: torch.Tensor  # [tokens] int64
    empty_rows: torch.Tensor  # [tokens] bool


# Of (shard, SGLang's batch, lengths to read, the longest of them, what to fill).
Localise = Callable[[Shard, "ForwardBatch", torch.Tensor, int, LocalTensors], None]


class LocalViewBuilder:
    """Makes a `LocalView` of each batch; owns the local slot table.

    Parameters
    ----------
    table : Tensor [requests, positions]
        SGLang's `req_to_token`.
    dcp_size, kvp_rank : int
    page_size : int
        Of the rank's pool.

    Attributes
    ----------
    shard : Shard
    local_table : Tensor [requests, ceil(positions / dcp_size)]
        The shard's; rows that a batch reads are fresh once it is localised.
    """

    def __init__(
        self, table: torch.Tensor, dcp_size: int, kvp_rank: int, page_size: int
    ) -> None:
        rows, positions = table.shape
        self.local_table = table.new_zeros(rows, -(-positions // dcp_size))
        self.shard = Shard(table, self.local_table, dcp_size, kvp_rank, page_size)
        self._localise = _localise_on(table.device)
        self._static: Optional[LocalTensors] = None

    def init_static(self, max_bs: int) -> None:
        """Allocate the tensors that captured decode steps read at every replay."""
        device = self.local_table.device
        self._static = LocalTensors(
            seq_lens=torch.zeros(max_bs, dtype=torch.int64, device=device),
            out_cache_loc=torch.zeros(max_bs, dtype=torch.int64, device=device),
            empty_rows=torch.zeros(max_bs, dtype=torch.bool, device=device),
        )

    def build_static(self, batch: ForwardBatch) -> LocalView:
        """`build` for a decode step in a CUDA graph: same addresses at every replay."""
        assert self._static is not None, "init_static has not run"
        out = LocalTensors(*(tensor[: batch.batch_size] for tensor in self._static))
        return self._build(batch, *_lens_to_read(batch), out)

    def build(self, batch: ForwardBatch) -> LocalView:
        """Localise `batch` and refresh the table rows that it reads."""
        slots = batch.out_cache_loc
        extend = batch.forward_mode.is_extend()
        tokens = sum(batch.extend_seq_lens_cpu) if extend else batch.batch_size
        if len(slots) != tokens:
            raise ValueError(f"{len(slots)} slots for {tokens} new tokens")
        lens, lens_cpu = _lens_to_read(batch)
        out = LocalTensors(
            seq_lens=torch.empty_like(lens),
            out_cache_loc=torch.empty_like(slots),
            empty_rows=torch.empty_like(slots, dtype=torch.bool),
        )
        return self._build(batch, lens, lens_cpu, out)

    def _build(
        self,
        batch: ForwardBatch,
        lens: torch.Tensor,
        lens_cpu: torch.Tensor,
        out: LocalTensors,
    ) -> LocalView:
        longest = int(lens_cpu.max())
        self._localise(self.shard, batch, lens, longest, out)
        local = self._local_batch(batch, lens_cpu, out)
        return LocalView(local, longest > 0, out.empty_rows)

    def _local_batch(
        self, batch: ForwardBatch, lens_cpu: torch.Tensor, out: LocalTensors
    ) -> ForwardBatch:
        local = copy.copy(batch)
        local.seq_lens = out.seq_lens
        local.seq_lens_cpu = local_lens(
            lens_cpu, self.shard.dcp_size, self.shard.kvp_rank
        )
        local.seq_lens_sum = int(local.seq_lens_cpu.sum())
        if batch.forward_mode.is_extend():
            local.extend_prefix_lens = local.seq_lens
            local.extend_prefix_lens_cpu = local.seq_lens_cpu.tolist()
        local.out_cache_loc = out.out_cache_loc
        return local


def _lens_to_read(batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of each request that are read from the pool, on device and host."""
    if batch.forward_mode.is_extend():
        return batch.extend_prefix_lens, torch.as_tensor(batch.extend_prefix_lens_cpu)
    return batch.seq_lens, batch.seq_lens_cpu


def _localise_on(device: torch.device) -> Localise:
    if device.type == "cpu":
        return localise_ref
    if device.type != "cuda":
        raise NotImplementedError(f"no localisation on {device}: cuda or cpu")
    # Not at module level: CPU users may have no Triton.
    from sglang_dcp.layers.local_view_triton import localise

    return localise
