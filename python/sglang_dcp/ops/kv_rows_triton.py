"""Triton kernels of ``kv_rows`` and their launchers.

A kernel copies words, whatever they stand for: of 8 bytes where all rows divide into them,
else of one number. ``kv_rows`` checks the arguments. ``kv_rows_torch`` has the references.

Numbers of rows and of layers change with the length of a prefix. Triton compiles a kernel
anew for each value of a constant, so none of these is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: allow-untyped-defs

# Words and warps of one program.
_TILE, _WARPS = 1024, 4
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["rows", "layers"])
def _pack_kernel(
    pools, slots, heads, packed, rows, layers,
    k_slot, v_slot, WINDOW: tl.constexpr, QK: tl.constexpr, V: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    layer, rank = tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row, mask=inside, other=0).to(tl.int64)
    first = tl.load(heads + rank * WINDOW).to(tl.int64)
    word = packed.dtype.element_ty
    key = tl.load(pools + layer).to(tl.pointer_type(word))
    value = tl.load(pools + layers + layer).to(tl.pointer_type(word))
    place = (rank.to(tl.int64) * layers + layer) * rows + row
    out = packed + (place * WINDOW * (QK + V))[:, None]

    offs = tl.arange(0, K_BLOCK)[None, :]
    mask = inside[:, None] & (offs < WINDOW * QK)
    found = tl.load(key + (slot * k_slot + first * QK)[:, None] + offs, mask=mask)
    tl.store(out + offs, found, mask=mask)

    offs = tl.arange(0, V_BLOCK)[None, :]
    mask = inside[:, None] & (offs < WINDOW * V)
    found = tl.load(value + (slot * v_slot + first * V)[:, None] + offs, mask=mask)
    tl.store(out + WINDOW * QK + offs, found, mask=mask)


@triton.jit(do_not_specialize=["rows", "positions", "layers"])
def _order_kernel(
    packed, order, keys, values, rows, positions, layers,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    place = tl.load(order + position, mask=position < positions, other=-1)
    inside = place >= 0
    place = tl.maximum(place, 0).to(tl.int64)
    rank, row = place // rows, place % rows
    source = (rank * layers + layer) * rows + row
    source = packed + (source * (K_WIDTH + V_WIDTH))[:, None]
    place = layer.to(tl.int64) * positions + position

    offs = tl.arange(0, K_BLOCK)[None, :]
    mask = inside[:, None] & (offs < K_WIDTH)
    found = tl.load(source + offs, mask=mask)
    tl.store(keys + (place * K_WIDTH)[:, None] + offs, found, mask=mask)

    offs = tl.arange(0, V_BLOCK)[None, :]
    mask = inside[:, None] & (offs < V_WIDTH)
    found = tl.load(source + K_WIDTH + offs, mask=mask)
    tl.store(values + (place * V_WIDTH)[:, None] + offs, found, mask=mask)


def pack(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    heads: Tensor,
    packed: Tensor,
) -> None:
    """Launch ``pack_kv_rows``."""
    packed, shrink = _as_words(packed, keys[0].shape[2], values[0].shape[2])
    qk, v = keys[0].shape[2] // shrink, values[0].shape[2] // shrink
    window, rows = heads.shape[1], len(slots)
    pools = torch.tensor([pool.data_ptr() for pool in (*keys, *values)])
    blocks = _blocks(window * qk, window * v)
    grid = (triton.cdiv(rows, blocks["ROWS"]), len(keys), len(heads))
    _pack_kernel[grid](
        pools.to(packed.device, non_blocking=True), slots, heads, packed, rows,
        len(keys), keys[0].shape[1] * qk, values[0].shape[1] * v,
        WINDOW=window, QK=qk, V=v, **blocks, num_warps=_WARPS,
    )  # fmt: skip


def order(packed: Tensor, order: Tensor, keys: Tensor, values: Tensor) -> None:
    """Launch ``order_kv_rows``, into `keys` and `values`."""
    (window, qk), v = keys.shape[2:], values.shape[3]
    packed, shrink = _as_words(packed, qk, v)
    keys, values = (out.view(packed.dtype) for out in (keys, values))
    layers, rows = packed.shape[1:3]
    blocks = _blocks(window * qk // shrink, window * v // shrink)
    grid = (triton.cdiv(len(order), blocks["ROWS"]), layers)
    _order_kernel[grid](
        packed, order, keys, values, rows, len(order), layers,
        K_WIDTH=window * qk // shrink, V_WIDTH=window * v // shrink,
        **blocks, num_warps=_WARPS,
    )  # fmt: skip


def _as_words(packed: Tensor, qk: int, v: int) -> tuple[Tensor, int]:
    """View rows as words, and say how many numbers one has."""
    for size in (8, packed.itemsize):
        if not (qk * packed.itemsize) % size and not (v * packed.itemsize) % size:
            return packed.view(_WORDS[size]), size // packed.itemsize
    raise AssertionError("a number is a word")


def _blocks(k_width: int, v_width: int) -> dict[str, int]:
    k_block, v_block = triton.next_power_of_2(k_width), triton.next_power_of_2(v_width)
    rows = max(1, _TILE // max(k_block, v_block))
    return {"K_BLOCK": k_block, "V_BLOCK": v_block, "ROWS": rows}
