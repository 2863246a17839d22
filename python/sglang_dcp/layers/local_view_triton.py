"""The kernel that localises a batch, and its launcher.

Program (r, b) serves request r of the batch: positions and new tokens of its b-th block.
Nothing is read on the host and all results go where the caller allocated them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_dcp.layers.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.local_view import LocalTensors, Shard

# mypy: allow-untyped-defs

BLOCK = 1024
DUMMY = tl.constexpr(DUMMY_SLOT)


def localise(
    shard: Shard,
    batch: ForwardBatch,
    lens: torch.Tensor,
    longest: int,
    out: LocalTensors,
) -> None:
    """Local lengths, slots and empty rows of `batch`, and its rows of the local table.

    Each row is rewritten up to its own length. Rows that repeat (the padding of a
    replayed batch is request 0, one position) get the same values twice. Where a padded
    batch has more rows than new slots, the rest of `out.out_cache_loc` is `DUMMY_SLOT`.

    Parameters
    ----------
    shard : Shard
        `table` of any strides, `local_table` with contiguous rows.
    batch : ForwardBatch
        Read are its mode, its size and, int32 or int64 and contiguous,
        `req_pool_indices` [requests], `out_cache_loc` [tokens or fewer] and in extend
        `extend_seq_lens` and `extend_start_loc` [requests].
    lens : Tensor [requests] int32 or int64
        Positions that the forward reads: all in decode, the prefix in extend.
    longest : int
        At least the largest of `lens`; known on the host, so nothing waits.
    out : LocalTensors
        Contiguous. One launch fills it, whose grid varies with `longest`: not for capture
        in a CUDA graph, but right before a replay.
    """
    starts = counts = None
    most_new = 1
    if batch.forward_mode.is_extend():
        starts, counts = batch.extend_start_loc, batch.extend_seq_lens
        most_new = max(batch.extend_seq_lens_cpu)
    vectors = (batch.req_pool_indices, lens, batch.out_cache_loc, starts, counts)
    if not all(v is None or v.is_contiguous() for v in vectors):
        raise ValueError("indices, lengths and slots of a batch must be contiguous")
    places = max(local_lens(longest, shard.dcp_size, shard.kvp_rank), most_new)
    _localise_kernel[(batch.batch_size, triton.cdiv(places, BLOCK))](
        *vectors,
        *out,
        shard.table,
        *shard.table.stride(),
        shard.local_table,
        shard.local_table.stride(0),
        len(batch.out_cache_loc),
        shard.kvp_rank,
        KVP=shard.dcp_size,
        PAGE=shard.page_size,
        BLOCK=BLOCK,
    )


# Else Triton would compile variants amid serving, for other alignments and where a count
# is 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["written", "rank"],
    do_not_specialize_on_alignment=["rows", "lens", "slots", "starts", "counts"],
)
def _localise_kernel(
    rows, lens, slots, starts, counts, own_lens, own_slots, empty_rows,
    table, table_row, table_position, local_table, local_row, written, rank,
    KVP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    place = first + tl.arange(0, BLOCK)
    keys = (tl.load(lens + request) + (KVP - 1 - rank)) // KVP
    if first == 0:
        tl.store(own_lens + request, keys)

    # In decode request r has one new token, the r-th.
    start = request if starts is None else tl.load(starts + request)
    count = 1 if counts is None else tl.load(counts + request)
    if first < count:
        token = start + place
        new = place < count
        # Where a replayed batch is padded there are rows without a slot.
        given = new & (token < written)
        slot = tl.load(slots + token, mask=given, other=DUMMY)
        local = slot // KVP
        local = tl.where(slot % KVP == rank, local, local % PAGE)
        tl.store(own_slots + token, local, mask=new)
        tl.store(empty_rows + token, keys == 0, mask=new)

    if first < keys:
        # 64-bit: a table may have more than 2**31 entries.
        row = tl.load(rows + request).to(tl.int64)
        position = place.to(tl.int64) * KVP + rank
        owned = place < keys
        entry = table + row * table_row + position * table_position
        slot = tl.load(entry, mask=owned, other=0)
        tl.store(local_table + row * local_row + place, slot // KVP, mask=owned)
