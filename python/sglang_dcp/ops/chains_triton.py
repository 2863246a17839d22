"""The Triton kernel of chain attention, and its launcher.

One program serves one request and one head. The query tokens of a request fit into one
tile, and so do their keys. Launches read no device value on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_dcp.ops.lse_merge_triton import is_live

if TYPE_CHECKING:
    from sglang_dcp.ops.chains import Chains, ChainSizes

# mypy: allow-untyped-defs

# The least that a matrix product of Triton takes.
_LEAST_TILE = 16
_BLOCK = 64


def attend_chains_triton(
    chains: Chains, prefix: torch.Tensor, prefix_lse: torch.Tensor, sizes: ChainSizes
) -> torch.Tensor:
    """Do what `chains.attend_chains` does, in one launch."""
    q, k, v, q_rope, k_rope = chains
    width, scaling, first_head, heads_of_kv, is_lse_base_on_e = sizes
    tokens, heads, dim = q.shape
    out = prefix.new_empty(prefix.shape)
    rope = 0
    if q_rope is None or k_rope is None:
        # The kernel reads nothing through these.
        q_rope, k_rope = q, k
    else:
        rope = q_rope.shape[2]
    _attend_chains_kernel[(tokens // width, heads)](
        *(q, q_rope, k, k_rope, v, prefix, prefix_lse, out),
        *q.stride(),
        *q_rope.stride(),
        *k.stride(),
        *k_rope.stride(),
        *v.stride(),
        *prefix.stride(),
        *prefix_lse.stride(),
        *out.stride(),
        scaling,
        first_head,
        width,
        TILE=max(_LEAST_TILE, triton.next_power_of_2(width)),
        HEADS_OF_KV=heads_of_kv,
        D=dim,
        ROPE=rope,
        DV=v.shape[2],
        BASE_E=is_lse_base_on_e,
        BLOCK=_BLOCK,
    )
    return out


@triton.jit
def _dot(a, b, acc):
    # "ieee": products of float32 are not rounded to TF32.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _scores(
    q, k, q_t, q_d, k_t, k_d, token, real, acc, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for first in tl.static_range(0, D, BLOCK):
        dims = first + tl.arange(0, BLOCK)
        there = real[:, None] & (dims < D)[None, :]
        a = tl.load(q + token[:, None] * q_t + dims[None, :] * q_d, there, other=0.0)
        b = tl.load(k + token[:, None] * k_t + dims[None, :] * k_d, there, other=0.0)
        acc = _dot(a, tl.trans(b), acc)
    return acc


# A width of its own would be compiled for each size of a captured chain.
@triton.jit(do_not_specialize=["first_head", "width"])
def _attend_chains_kernel(
    q, q_rope, k, k_rope, v, prefix, prefix_lse, out,
    q_t, q_h, q_d, qr_t, qr_h, qr_d, k_t, k_h, k_d, kr_t, kr_h, kr_d, v_t, v_h, v_d,
    p_t, p_h, p_d, l_t, l_h, o_t, o_h, o_d, scaling, first_head, width,
    TILE: tl.constexpr, HEADS_OF_KV: tl.constexpr, D: tl.constexpr,
    ROPE: tl.constexpr, DV: tl.constexpr, BASE_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    kv = (first_head + head) // HEADS_OF_KV
    row = tl.arange(0, TILE)
    real = row < width
    token = tl.program_id(0).to(tl.int64) * width + row

    scores = tl.zeros((TILE, TILE), tl.float32)
    scores = _scores(
        q + head * q_h, k + kv * k_h, q_t, q_d, k_t, k_d, token, real, scores, D, BLOCK
    )
    if ROPE > 0:
        scores = _scores(
            q_rope + head * qr_h, k_rope + kv * kr_h, qr_t, qr_d, kr_t, kr_d,
            token, real, scores, ROPE, BLOCK,
        )  # fmt: skip
    # Rows that only fill the tile see themselves, so that no row is without a key.
    scores = tl.where(row[None, :] <= row[:, None], scores * scaling, float("-inf"))

    before = tl.load(prefix_lse + token * l_t + head * l_h, real, other=float("-inf"))
    live = is_live(before)
    before = tl.where(live, before, float("-inf"))
    if not BASE_E:
        before = before * 0.6931471805599453
    peak = tl.maximum(tl.max(scores, 1), before)
    share = tl.exp(scores - peak[:, None])
    kept = tl.exp(before - peak)
    total = tl.sum(share, 1) + kept
    for first in tl.static_range(0, DV, BLOCK):
        dims = first + tl.arange(0, BLOCK)
        there = real[:, None] & (dims < DV)[None, :]
        values = tl.load(
            v + kv * v_h + token[:, None] * v_t + dims[None, :] * v_d, there, other=0.0
        )
        acc = _dot(share.to(values.dtype), values, tl.zeros((TILE, BLOCK), tl.float32))
        # What a row without a prefix holds may be NaN.
        seen = tl.load(
            prefix + head * p_h + token[:, None] * p_t + dims[None, :] * p_d,
            there & live[:, None],
            other=0.0,
        ).to(tl.float32)
        merged = (acc + kept[:, None] * seen) / total[:, None]
        tl.store(
            out + head * o_h + token[:, None] * o_t + dims[None, :] * o_d, merged, there
        )
