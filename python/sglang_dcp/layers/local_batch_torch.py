"""The local batch in plain torch: the CPU path, and the reference of the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_dcp.ops.layout import (
    DUMMY_SLOT,
    local_lens,
    local_slots,
    refresh_local_table,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.local_batch_types import LocalTensors, Shard


def fill_local_tensors_torch(
    shard: Shard,
    batch: ForwardBatch,
    lens: torch.Tensor,
    longest: int,
    out: LocalTensors,
) -> None:
    """Do what `local_batch_triton.fill_local_tensors` does, with torch operators."""
    where = (shard.dcp_size, shard.dcp_rank)
    refresh_local_table(
        shard.local_table, shard.table, batch.req_pool_indices, lens, *where
    )
    out.seq_lens.copy_(local_lens(lens, *where))
    # A replayed decode batch has fewer slots than rows. A padded prefill has more.
    slots = batch.out_cache_loc[: len(out.out_cache_loc)]
    written = len(slots)
    out.out_cache_loc[:written] = local_slots(slots, *where, shard.page_size)
    out.out_cache_loc[written:] = DUMMY_SLOT
    empty = out.seq_lens == 0
    if batch.forward_mode.is_extend():
        empty = torch.repeat_interleave(empty, batch.extend_seq_lens)
    else:
        empty = empty.repeat_interleave(len(out.empty_rows) // len(empty))
    out.empty_rows.copy_(empty)
