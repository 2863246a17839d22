"""The batch as one rank's pool sees it: local lengths, local slots, local table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch

from sglang_dcp.layers.layout import (
    DUMMY_SLOT,
    local_lens,
    local_slots,
    refresh_local_table,
)

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


class _StaticBatch(NamedTuple):
    """What a captured decode step reads of a local batch, [max_bs] each."""

    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    empty_rows: torch.Tensor


class LocalViewBuilder:
    """Makes a `LocalView` of each batch; owns the local slot table.

    Parameters
    ----------
    table : Tensor [requests, positions]
        SGLang's `req_to_token`.
    dcp_size, kvp_rank : int
    """

    def __init__(self, table: torch.Tensor, dcp_size: int, kvp_rank: int) -> None:
        self._table = table
        self._dcp_size = dcp_size
        self._kvp_rank = kvp_rank
        rows, positions = table.shape
        self.local_table = table.new_zeros(rows, -(-positions // dcp_size))
        self._static: Optional[_StaticBatch] = None

    def init_static(self, max_bs: int) -> None:
        """Allocate the tensors that captured decode steps read at every replay."""
        device = self._table.device
        self._static = _StaticBatch(
            seq_lens=torch.zeros(max_bs, dtype=torch.int64, device=device),
            out_cache_loc=torch.zeros(max_bs, dtype=torch.int64, device=device),
            empty_rows=torch.zeros(max_bs, dtype=torch.bool, device=device),
        )

    def build_static(self, batch: ForwardBatch) -> LocalView:
        """`build` for a decode step in a CUDA graph: same addresses at every replay."""
        assert self._static is not None, "init_static has not run"
        view = self.build(batch)
        bs = batch.batch_size
        static = _StaticBatch(*(tensor[:bs] for tensor in self._static))
        static.seq_lens.copy_(view.batch.seq_lens)
        # Replayed batches are padded, their slots are not.
        written = len(view.batch.out_cache_loc)
        static.out_cache_loc[:written].copy_(view.batch.out_cache_loc)
        static.out_cache_loc[written:].fill_(DUMMY_SLOT)
        static.empty_rows.copy_(view.empty_rows)
        view.batch.seq_lens = static.seq_lens
        view.batch.out_cache_loc = static.out_cache_loc
        return LocalView(view.batch, True, static.empty_rows)

    def build(self, batch: ForwardBatch) -> LocalView:
        """Localise `batch` and refresh the table rows that it reads."""
        extend = batch.forward_mode.is_extend()
        if extend:
            lens, lens_cpu = batch.extend_prefix_lens, batch.extend_prefix_lens_cpu
            longest = max(lens_cpu, default=0)
        else:
            lens, lens_cpu = batch.seq_lens, batch.seq_lens_cpu
            longest = int(lens_cpu.max()) if len(lens_cpu) else 0
        if longest:
            refresh_local_table(
                self.local_table,
                self._table,
                batch.req_pool_indices,
                longest,
                self._dcp_size,
                self._kvp_rank,
            )
        local = self._local_batch(batch, lens, torch.as_tensor(lens_cpu))
        empty = local.seq_lens == 0
        if extend:
            empty = torch.repeat_interleave(
                empty, batch.extend_seq_lens, output_size=sum(batch.extend_seq_lens_cpu)
            )
        return LocalView(local, longest > 0, empty)

    def _local_batch(
        self, batch: ForwardBatch, lens: torch.Tensor, lens_cpu: torch.Tensor
    ) -> ForwardBatch:
        where = (self._dcp_size, self._kvp_rank)
        local = copy.copy(batch)
        local.seq_lens = local_lens(lens, *where)
        local.seq_lens_cpu = local_lens(lens_cpu, *where)
        local.seq_lens_sum = int(local.seq_lens_cpu.sum())
        if batch.forward_mode.is_extend():
            local.extend_prefix_lens = local.seq_lens
            local.extend_prefix_lens_cpu = local.seq_lens_cpu.tolist()
        local.out_cache_loc = local_slots(batch.out_cache_loc, *where)
        return local
