"""The kernel that fills a local batch, and its launcher.

Program (r, b) serves block b of request r: its local positions and its new tokens. The
launcher reads no device value on the host, and all results go to tensors of the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_dcp.ops.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.local_batch_types import LocalTensors, Shard

# mypy: allow-untyped-defs

BLOCK = 1024
DUMMY = tl.constexpr(DUMMY_SLOT)


def fill_local_tensors(
    shard: Shard,
    batch: ForwardBatch,
    lens: torch.Tensor,
    longest: int,
    out: LocalTensors,
) -> None:
    """Fill local lengths, slots, empty rows and table rows of `batch`, in one launch.

    Each table row is rewritten up to its length. A repeated row gets the same values
    twice: the padding of a replayed batch is request 0 with one position. If a padded
    batch has more rows than new slots, the rest of `out.out_cache_loc` is `DUMMY_SLOT`.
    Slots behind those of all requests are ignored: they pad a prefill.

    Not for CUDA-graph capture, because the grid depends on `longest`. It runs before each
    replay.

    Parameters
    ----------
    shard : Shard
        `table` has any strides, `local_table` has contiguous rows.
    batch : ForwardBatch
        It reads the mode, the size, `req_pool_indices` [requests] and `out_cache_loc`
        [tokens or fewer]. In decode all requests have equally many tokens. In extend it
        also reads `extend_seq_lens` and `extend_start_loc` [requests]. They are int32 or int64,
        and contiguous.
    lens : Tensor [requests] int32 or int64
        Positions that the forward reads: all in decode, the prefix in extend.
    longest : int
        At least the largest of `lens`, known on the host, so that nothing waits.
    out : LocalTensors
        Contiguous.

    Raises
    ------
    ValueError
        A tensor of the batch is not contiguous.
    """
    starts = counts = None
    width = 1
    if batch.forward_mode.is_extend():
        starts, counts = batch.extend_start_loc, batch.extend_seq_lens
        most_new = max(batch.extend_seq_lens_cpu)
    else:
        # The requests of a verification have equally many query tokens.
        most_new = width = len(out.empty_rows) // batch.batch_size
    vectors = (batch.req_pool_indices, lens, batch.out_cache_loc, starts, counts)
    if not all(v is None or v.is_contiguous() for v in vectors):
        raise ValueError("indices, lengths and slots of a batch must be contiguous")
    places = max(local_lens(longest, shard.dcp_size, shard.dcp_rank), most_new)
    _fill_local_tensors_kernel[(batch.batch_size, triton.cdiv(places, BLOCK))](
        *vectors,
        *out,
        shard.table,
        *shard.table.stride(),
        shard.local_table,
        shard.local_table.stride(0),
        len(batch.out_cache_loc),
        shard.dcp_rank,
        width,
        DCP_SIZE=shard.dcp_size,
        PAGE=shard.page_size,
        BLOCK=BLOCK,
    )


# Without these options Triton would compile new variants while serving: for other
# alignments, and for a count of 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["written", "rank", "width"],
    do_not_specialize_on_alignment=["rows", "lens", "slots", "starts", "counts"],
)
def _fill_local_tensors_kernel(
    rows, lens, slots, starts, counts, own_lens, own_slots, empty_rows,
    table, table_row, table_position, local_table, local_row, written, rank, width,
    DCP_SIZE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    place = first + tl.arange(0, BLOCK)
    keys = (tl.load(lens + request) + (DCP_SIZE - 1 - rank)) // DCP_SIZE
    if first == 0:
        tl.store(own_lens + request, keys)

    start = request * width if starts is None else tl.load(starts + request)
    count = width if counts is None else tl.load(counts + request)
    if first < count:
        token = start + place
        new = place < count
        # The padding rows of a replayed batch have no slot.
        given = new & (token < written)
        slot = tl.load(slots + token, mask=given, other=DUMMY)
        local = slot // DCP_SIZE
        local = tl.where(slot % DCP_SIZE == rank, local, local % PAGE)
        tl.store(own_slots + token, local, mask=new)
        tl.store(empty_rows + token, keys == 0, mask=new)

    if first < keys:
        # In 64 bits, because a table may have more than 2**31 entries.
        row = tl.load(rows + request).to(tl.int64)
        position = place.to(tl.int64) * DCP_SIZE + rank
        owned = place < keys
        entry = table + row * table_row + position * table_position
        slot = tl.load(entry, mask=owned, other=0)
        tl.store(local_table + row * local_row + place, slot // DCP_SIZE, mask=owned)
