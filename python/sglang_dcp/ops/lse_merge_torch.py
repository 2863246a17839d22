"""The LSE merge in plain torch: the CPU path, and the reference of ``lse_merge_triton``.

The compute dtype is float64 for float64 inputs and float32 for all others.
"""

from __future__ import annotations

import torch


def lse_weighted_combine_torch(
    outs: torch.Tensor, lses: torch.Tensor, *, is_lse_base_on_e: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge ``outs`` [N, T, H, D] by ``lses`` [N, T, H].

    Returns [T, H, D] and [T, H], both in the compute dtype.
    """
    weights, merged_lse = _shard_weights(_compute(outs, lses), is_lse_base_on_e)
    live = torch.isfinite(lses).unsqueeze(-1)
    # An empty shard may hold NaN or inf, which a multiplication by 0 would keep.
    values = torch.where(live, outs.to(weights.dtype), 0)
    return _sum_in_rank_order(values * weights.unsqueeze(-1)), merged_lse


def correct_attn_out_torch(
    out: torch.Tensor, lses: torch.Tensor, rank: int, *, is_lse_base_on_e: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale ``out`` [T, H, D] by the weight of ``rank`` among ``lses`` [N, T, H].

    Returns it and the merged LSE [T, H], both in the compute dtype.
    """
    weights, merged_lse = _shard_weights(_compute(out, lses), is_lse_base_on_e)
    live = torch.isfinite(lses[rank]).unsqueeze(-1)
    values = torch.where(live, out.to(weights.dtype), 0)
    return values * weights[rank].unsqueeze(-1), merged_lse


def merge_two_states_torch(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states [T, H, D] with LSE [T, H]; results are in the compute dtype."""
    return lse_weighted_combine_torch(
        torch.stack([o_a, o_b]),
        torch.stack([lse_a, lse_b]),
        is_lse_base_on_e=is_lse_base_on_e,
    )


def _compute(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    return lses.to(torch.float64 if outs.dtype == torch.float64 else torch.float32)


def _sum_in_rank_order(parts: torch.Tensor) -> torch.Tensor:
    # torch.sum adds in an order that depends on sizes and strides.
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _shard_weights(
    lses: torch.Tensor, is_lse_base_on_e: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    exp, log = (torch.exp, torch.log) if is_lse_base_on_e else (torch.exp2, torch.log2)
    empty = ~torch.isfinite(lses)
    peak = lses.masked_fill(empty, float("-inf")).amax(0)
    peak = peak.masked_fill(empty.all(0), 0.0)
    raw = exp(lses - peak).masked_fill(empty, 0.0)
    total = _sum_in_rank_order(raw)
    # If every shard is empty, total is 0. Its log is -inf, the LSE of no keys. The
    # division needs another divisor, because 0 / 0 is NaN.
    return raw / total.masked_fill(empty.all(0), 1.0), peak + log(total)
