"""Triton kernels of ``merge_peers`` and their launchers.

One program handles several (token, head) rows, as many as make one 16-byte load a thread
of 2-byte values. Launchers write into tensors that the caller allocates and read no device value
on the host, so they may be captured in a CUDA graph; Triton itself skips an empty grid.
Checks live in ``merge_peers``, the references in ``merge_ref``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_dcp.layers.merge_triton import (
    is_live,
    live_length,
    merged_lse,
    share_of,
    weight_of,
)

# mypy: allow-untyped-defs

# Elements and warps a program. At 64 tokens on H200, between NCCL's launches, no other
# choice tried was faster; timed alone, on data that no one rewrites, two loads a thread are.
_TILE, _WARPS = 2048, 8
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _rows_of(total, ROWS: tl.constexpr):
    # Numbers of rows fit 32 bits, in which they are divided; addresses do not.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row, row < total


@triton.jit
def _row_mask(offs, inside, D: tl.constexpr):
    # A length and not a mask: testing rows per lane would break up vector loads.
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
    # A row outside is an empty shard: nothing of it is read.
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
    # The width is a constant so that the compiler can prove 16-byte aligned rows; of a
    # run-time stride it knows whether it is a multiple of 16 elements only.
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
        # An empty shard's row is never read, so whatever it holds cannot spread.
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
    """Programs for ``rows``, and what their kernel has to know."""
    block = triton.next_power_of_2(head_dim)
    each = max(1, _TILE // block)
    constants = {"D": head_dim, "BLOCK": block, "ROWS": each, "num_warps": _WARPS}
    return triton.cdiv(rows, each), constants


def combine(
    rows: Tensor, lses: Tensor, own: Tensor, own_lse: Tensor, rank: int,
    out: Tensor, lse: Tensor, is_lse_base_on_e: bool,
) -> None:  # fmt: skip
    """Peers' rows and the own [T, h, D], [T, h] -> contiguous ``out`` and ``lse``.

    ``rows`` is contiguous [N - 1, T, h, width >= D], ``lses`` [N - 1, T, h], or
    [N, T, h] with the own among them. All but ``rows`` may have any strides.
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
    """[T, H, D] and [T, H] of any strides -> contiguous ``rows`` [N - 1, T, h, width].

    With ``lse`` None the width is D, else a row ends with its LSE.
    """
    peers, tokens, heads, width = rows.shape
    # Integer views: the kernel moves bits and must not touch a NaN's payload.
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
    """Contiguous [N, T, h, D] -> contiguous ``out`` [T, N * h, D]."""
    _, tokens, heads, head_dim = gathered.shape
    bits = _BITS[out.element_size()]
    rows = tokens * out.shape[1]
    programs, constants = _tiles(rows, head_dim)
    _interleave_kernel[(programs,)](
        gathered.view(bits), out.view(bits), rows, tokens,
        HEADS=heads, ALL_HEADS=out.shape[1], **constants,
    )  # fmt: skip
