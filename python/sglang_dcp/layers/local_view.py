"""The batch as one rank's pool sees it: local lengths, local slots, local table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

import torch

from sglang_dcp.layers.layout import local_lens, local_slots, refresh_local_table

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class LocalView:
    """One forward, localised.

    Attributes
    ----------
    batch : ForwardBatch
        Copy of SGLang's with `seq_lens`, `seq_lens_cpu`, `seq_lens_sum` and
        `out_cache_loc` of this rank's pool. In extend the lengths are the prefix's.
    reads_keys : bool
        Whether any rank reads keys from its pool; the same on all ranks.
    empty_rows : Tensor [tokens] bool, or None
        Queries whose request has no key on this rank.
    """

    batch: ForwardBatch
    reads_keys: bool
    empty_rows: Optional[torch.Tensor]


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
            empty = torch.repeat_interleave(empty, batch.extend_seq_lens)
        return LocalView(local, longest > 0, empty)

    def _local_batch(
        self, batch: ForwardBatch, lens: torch.Tensor, lens_cpu: torch.Tensor
    ) -> ForwardBatch:
        where = (self._dcp_size, self._kvp_rank)
        local = copy.copy(batch)
        local.seq_lens = local_lens(lens, *where)
        local.seq_lens_cpu = local_lens(lens_cpu, *where)
        local.seq_lens_sum = int(local.seq_lens_cpu.sum())
        local.out_cache_loc = local_slots(batch.out_cache_loc, *where)
        return local
