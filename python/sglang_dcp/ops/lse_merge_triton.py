"""Triton kernels of the LSE merge and their launchers.

One program handles one row, which is one token and one head. Shards are summed in rank
order, in float32. Launchers write into tensors that the caller allocates and read no
device value on the host, so they are safe in CUDA-graph capture. Triton skips the empty
grid of zero tokens. ``lse_merge`` checks the arguments. ``lse_merge_torch`` is the
reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# mypy: allow-untyped-defs


@triton.jit
def is_live(lse):
    # Both comparisons are false for NaN, so NaN counts as an empty shard.
    return (lse > float("-inf")) & (lse < float("inf"))


@triton.jit
def live_length(lse, D: tl.constexpr):
    # A length, not a mask: a test of the LSE in each lane would split vector loads.
    return tl.where(is_live(lse), D, 0)


@triton.jit
def weight_of(lse, peak, BASE_E: tl.constexpr):
    # If all shards are empty, this is -inf - -inf = NaN, and the mask below gives 0.
    power = lse - peak
    raw = tl.exp(power) if BASE_E else tl.exp2(power)
    return tl.where(is_live(lse), raw, 0.0)


@triton.jit
def share_of(lse, peak, total, BASE_E: tl.constexpr):
    # The division is done once for each row, not once for each element.
    return weight_of(lse, peak, BASE_E) / tl.where(total > 0.0, total, 1.0)


@triton.jit
def merged_lse(peak, total, BASE_E: tl.constexpr):
    log = tl.log(total) if BASE_E else tl.log2(total)
    return tl.where(total > 0.0, peak + log, float("-inf"))


@triton.jit
def _peak_and_total(lse_ptr, stride_n, N: tl.constexpr, BASE_E: tl.constexpr):
    peak = tl.full((), float("-inf"), tl.float32)
    shard = lse_ptr
    for _ in tl.static_range(N):
        lse = tl.load(shard)
        peak = tl.maximum(peak, tl.where(is_live(lse), lse, float("-inf")))
        # The pointer advances by one stride, because n * stride could overflow 32 bits.
        shard += stride_n
    total = tl.full((), 0.0, tl.float32)
    shard = lse_ptr
    for _ in tl.static_range(N):
        total += weight_of(tl.load(shard), peak, BASE_E)
        shard += stride_n
    return peak, total


@triton.jit
def _combine_kernel(
    outs, lses, out, lse, o_n, o_t, o_h, o_d, l_n, l_t, l_h,
    N: tl.constexpr, D: tl.constexpr, BASE_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    out_ptrs = outs + t * o_t + h * o_h + offs * o_d
    lse_ptr = lses + t * l_t + h * l_h
    peak, total = _peak_and_total(lse_ptr, l_n, N, BASE_E)
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(N):
        value = tl.load(lse_ptr)
        # An empty shard's row is never read, so a NaN in it cannot spread.
        part = tl.load(out_ptrs, mask=offs < live_length(value, D), other=0.0)
        acc += part.to(tl.float32) * share_of(value, peak, total, BASE_E)
        lse_ptr += l_n
        out_ptrs += o_n
    row = t * tl.num_programs(1) + h
    tl.store(out + row * D + offs, acc, mask=offs < D)
    tl.store(lse + row, merged_lse(peak, total, BASE_E))


@triton.jit
def _correct_kernel(
    out, lses, own_lse, corrected, lse, o_t, o_h, o_d, l_n, l_t, l_h, c_t, c_h, c_d,
    N: tl.constexpr, D: tl.constexpr, BASE_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    lse_row = t * l_t + h * l_h
    peak, total = _peak_and_total(lses + lse_row, l_n, N, BASE_E)
    own = tl.load(own_lse + lse_row)
    live = offs < live_length(own, D)
    value = tl.load(out + t * o_t + h * o_h + offs * o_d, mask=live, other=0.0)
    ptrs = corrected + t * c_t + h * c_h + offs * c_d
    scaled = value.to(tl.float32) * share_of(own, peak, total, BASE_E)
    tl.store(ptrs, scaled, mask=offs < D)
    tl.store(lse + t * tl.num_programs(1) + h, merged_lse(peak, total, BASE_E))


# In an LSE of [heads, tokens] the stride of a head is the number of tokens, which changes.
@triton.jit(do_not_specialize=["la_h", "lb_h"])
def _merge_two_kernel(
    o_a, lse_a, o_b, lse_b, out, lse,
    a_t, a_h, a_d, la_t, la_h, b_t, b_h, b_d, lb_t, lb_h,
    D: tl.constexpr, BASE_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    s_a = tl.load(lse_a + t * la_t + h * la_h)
    s_b = tl.load(lse_b + t * lb_t + h * lb_h)
    live_a = offs < live_length(s_a, D)
    live_b = offs < live_length(s_b, D)
    v_a = tl.load(o_a + t * a_t + h * a_h + offs * a_d, mask=live_a, other=0.0)
    v_b = tl.load(o_b + t * b_t + h * b_h + offs * b_d, mask=live_b, other=0.0)
    peak_a = tl.where(is_live(s_a), s_a, float("-inf"))
    peak_b = tl.where(is_live(s_b), s_b, float("-inf"))
    peak = tl.maximum(peak_a, peak_b)
    total = weight_of(s_a, peak, BASE_E) + weight_of(s_b, peak, BASE_E)
    acc = v_a.to(tl.float32) * share_of(s_a, peak, total, BASE_E)
    acc += v_b.to(tl.float32) * share_of(s_b, peak, total, BASE_E)
    row = t * tl.num_programs(1) + h
    tl.store(out + row * D + offs, acc, mask=offs < D)
    tl.store(lse + row, merged_lse(peak, total, BASE_E))


def _block(head_dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(head_dim)
    return {"D": head_dim, "BLOCK": block, "num_warps": min(4, max(1, block // 128))}


def combine(
    outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor, is_lse_base_on_e: bool
) -> None:
    """Merge [N, T, H, D], [N, T, H] of any strides into contiguous ``out``, ``lse``."""
    n, tokens, heads, head_dim = outs.shape
    _combine_kernel[(tokens, heads)](
        outs, lses, out, lse, *outs.stride(), *lses.stride(),
        N=n, BASE_E=is_lse_base_on_e, **_block(head_dim),
    )  # fmt: skip


def correct(
    out: Tensor, lses: Tensor, rank: int,
    corrected: Tensor, lse: Tensor, is_lse_base_on_e: bool,
) -> None:  # fmt: skip
    """Scale [T, H, D] by [N, T, H] into ``corrected``, any strides, and contiguous ``lse``."""
    tokens, heads, head_dim = out.shape
    _correct_kernel[(tokens, heads)](
        out, lses, lses[rank], corrected, lse,
        *out.stride(), *lses.stride(), *corrected.stride(),
        N=lses.shape[0], BASE_E=is_lse_base_on_e, **_block(head_dim),
    )  # fmt: skip


def merge_two(
    o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor,
    out: Tensor, lse: Tensor, is_lse_base_on_e: bool,
) -> None:  # fmt: skip
    """Merge states [T, H, D], [T, H] of any strides into contiguous ``out``, ``lse``."""
    tokens, heads, head_dim = o_a.shape
    _merge_two_kernel[(tokens, heads)](
        o_a, lse_a, o_b, lse_b, out, lse,
        *o_a.stride(), *lse_a.stride(), *o_b.stride(), *lse_b.stride(),
        BASE_E=is_lse_base_on_e, **_block(head_dim),
    )  # fmt: skip
