"""Triton kernels of ``partials`` and their launchers.

A row is one token and one head. One program handles so many rows that each thread does
one 16-byte load if values have 2 bytes. Launchers write into tensors that the caller
allocates and read no device value on the host, so they are safe in CUDA-graph capture.
Triton skips an empty grid. ``partials`` checks the arguments. ``partials_torch`` has the
references.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_dcp.ops.lse_merge_triton import (
    is_live,
    live_length,
    merged_lse,
    share_of,
    weight_of,
)

# mypy: allow-untyped-defs

# Elements and warps of one program. No other choice was faster at 64 tokens on H200,
# between NCCL's launches. Timed alone on unchanged data, two loads per thread are faster.
_TILE, _WARPS = 2048, 8
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _rows_of(total, ROWS: tl.constexpr):
    # Row numbers fit 32 bits, which makes their division cheap. Addresses need 64 bits.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row, row < total


@triton.jit
def _row_mask(offs, inside, D: tl.constexpr):
    # A length, not a mask: a test of the row in each lane would split vector loads.
    return offs[None, :] < tl.where(inside, D, 0)[:, None]


@triton.jit
def _shard(n: tl.constexpr, own, peers, stride, RANK: tl.constexpr):
    if n == RANK:
        return own
    return peers + (n - (n > RANK)) * stride


@triton.jit
def _shard_lse(
    n: tl.constexpr, own, peers, stride, inside,
    RANK: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    ptrs = peers + n * stride if GATHERED else _shard(n, own, peers, stride, RANK)
    # A row beyond the last counts as an empty shard, so nothing of it is read.
    return tl.load(ptrs, mask=inside, other=float("-inf"))


@triton.jit(do_not_specialize=["total", "p_n"])
def _combine_kernel(
    own, own_lse, rows, lses, out, lse, total,
    o_t, o_h, o_d, l_t, l_h, p_n, p_t, p_h,
    N: tl.constexpr, RANK: tl.constexpr, GATHERED: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BASE_E: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, inside = _rows_of(total, ROWS)
    t, h = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    row = row.to(tl.int64)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    own += (t * o_t + h * o_h)[:, None] + (offs * o_d)[None, :]
    # A constant width lets the compiler prove that rows are 16-byte aligned. About a
    # run-time stride it knows only whether it is a multiple of 16 elements.
    rows += (row * WIDTH)[:, None] + offs[None, :]
    stride = total.to(tl.int64) * WIDTH
    own_lse += t * l_t + h * l_h
    lses += t * p_t + h * p_h
    p_n = p_n.to(tl.int64)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    for n in tl.static_range(N):
        value = _shard_lse(n, own_lse, lses, p_n, inside, RANK, GATHERED)
        peak = tl.maximum(peak, tl.where(is_live(value), value, float("-inf")))
    weights = tl.zeros((ROWS,), tl.float32)
    for n in tl.static_range(N):
        value = _shard_lse(n, own_lse, lses, p_n, inside, RANK, GATHERED)
        weights += weight_of(value, peak, BASE_E)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for n in tl.static_range(N):
        value = _shard_lse(n, own_lse, lses, p_n, inside, RANK, GATHERED)
        # An empty shard's row is never read, so a NaN in it cannot spread.
        mask = offs[None, :] < live_length(value, D)[:, None]
        part = tl.load(_shard(n, own, rows, stride, RANK), mask=mask, other=0.0)
        acc += part.to(tl.float32) * share_of(value, peak, weights, BASE_E)[:, None]
    ptrs = out + (row * D)[:, None] + offs[None, :]
    tl.store(ptrs, acc, mask=_row_mask(offs, inside, D))
    tl.store(lse + row, merged_lse(peak, weights, BASE_E), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _cut_kernel(
    out, lse, rows, lse_rows, total, o_t, o_h, o_d, l_t, l_h,
    RANK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    LSE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, inside = _rows_of(total, ROWS)
    slot = tl.program_id(1)
    peer = slot + (slot >= RANK).to(tl.int32)
    t, h = (row // HEADS).to(tl.int64), (peer * HEADS + row % HEADS).to(tl.int64)
    row = slot.to(tl.int64) * total + row
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask = _row_mask(offs, inside, D)
    ptrs = out + (t * o_t + h * o_h)[:, None] + (offs * o_d)[None, :]
    value = tl.load(ptrs, mask=mask)
    tl.store(rows + (row * WIDTH)[:, None] + offs[None, :], value, mask=mask)
    if LSE_WIDTH:
        value = tl.load(lse + t * l_t + h * l_h, mask=inside)
        tl.store(lse_rows + row * LSE_WIDTH + (LSE_WIDTH - 1), value, mask=inside)


@triton.jit(do_not_specialize=["total", "tokens"])
def _interleave_kernel(
    gathered, out, total, tokens,
    HEADS: tl.constexpr, ALL_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, inside = _rows_of(total, ROWS)
    t, h = row // ALL_HEADS, row % ALL_HEADS
    source = (h // HEADS * tokens + t) * HEADS + h % HEADS
    offs = tl.arange(0, BLOCK).to(tl.int64)
    mask = _row_mask(offs, inside, D)
    ptrs = gathered + (source.to(tl.int64) * D)[:, None] + offs[None, :]
    value = tl.load(ptrs, mask=mask)
    tl.store(out + (row.to(tl.int64) * D)[:, None] + offs[None, :], value, mask=mask)


def _tiles(rows: int, head_dim: int) -> tuple[int, dict[str, int]]:
    """Return the number of programs for ``rows`` rows, and the kernel's constants."""
    block = triton.next_power_of_2(head_dim)
    each = max(1, _TILE // block)
    constants = {"D": head_dim, "BLOCK": block, "ROWS": each, "num_warps": _WARPS}
    return triton.cdiv(rows, each), constants


def combine(
    rows: Tensor, lses: Tensor, own: Tensor, own_lse: Tensor, rank: int,
    out: Tensor, lse: Tensor, is_lse_base_on_e: bool,
) -> None:  # fmt: skip
    """Merge the peers' ``rows`` with this rank's ``own`` [T, h, D], ``own_lse`` [T, h].

    ``rows`` is contiguous [N - 1, T, h, width >= D]. ``lses`` is [N - 1, T, h] of the
    peers, or [N, T, h] of all ranks. ``out`` and ``lse`` are contiguous. The strides of
    ``own``, ``own_lse`` and ``lses`` are free.
    """
    peers, tokens, heads, width = rows.shape
    programs, constants = _tiles(tokens * heads, own.shape[-1])
    _combine_kernel[(programs,)](
        own, own_lse, rows, lses, out, lse, tokens * heads,
        *own.stride(), *own_lse.stride(), *lses.stride(),
        N=peers + 1, RANK=rank, GATHERED=lses.shape[0] > peers, HEADS=heads,
        WIDTH=width, BASE_E=is_lse_base_on_e, **constants,
    )  # fmt: skip


def cut(out: Tensor, lse: Tensor | None, rank: int, rows: Tensor) -> None:
    """Copy [T, H, D] and [T, H] of any strides to contiguous [N - 1, T, h, width].

    If ``lse`` is None, the width is D. Else each row ends with its LSE.
    """
    peers, tokens, heads, width = rows.shape
    # As integers, because a float copy may change the bits of a NaN.
    bits = _BITS[out.element_size()]
    programs, constants = _tiles(tokens * heads, out.shape[-1])
    _cut_kernel[(programs, peers)](
        out.view(bits),
        None if lse is None else lse.view(torch.int32),
        rows.view(bits),
        None if lse is None else rows.view(torch.int32),
        tokens * heads, *out.stride(), *((0, 0) if lse is None else lse.stride()),
        RANK=rank, HEADS=heads, WIDTH=width,
        LSE_WIDTH=0 if lse is None else width * rows.element_size() // 4, **constants,
    )  # fmt: skip


def interleave(gathered: Tensor, out: Tensor) -> None:
    """Copy contiguous [N, T, h, D] to contiguous ``out`` [T, N * h, D]."""
    _, tokens, heads, head_dim = gathered.shape
    bits = _BITS[out.element_size()]
    rows = tokens * out.shape[1]
    programs, constants = _tiles(rows, head_dim)
    _interleave_kernel[(programs,)](
        gathered.view(bits), out.view(bits), rows, tokens,
        HEADS=heads, ALL_HEADS=out.shape[1], **constants,
    )  # fmt: skip
