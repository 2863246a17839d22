"""Plain torch references of the LSE merge and of the exchange row layout.

Every kernel in ``merge_triton`` and ``merge_peers_triton`` must equal one here. Compute
dtype is float64 for float64 inputs and float32 for everything else.
"""

from __future__ import annotations

import torch

ROW_ALIGN_BYTES = 16
LSE_BYTES = 4


def packed_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of one packed row: ``head_dim`` values, padding, 4 bytes of LSE.

    Rows are a multiple of 16 bytes for every ``head_dim`` and dtype, so that each row
    starts where the widest vector load can, and the LSE sits in the last 4 bytes, so
    that it is float32-aligned even when ``head_dim`` is odd.
    """
    used_bytes = head_dim * dtype.itemsize + LSE_BYTES
    rows_of_align = -(-used_bytes // ROW_ALIGN_BYTES)
    return rows_of_align * ROW_ALIGN_BYTES // dtype.itemsize


def split_packed(
    packed: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a packed buffer [..., width]: payload [..., head_dim] and LSE [...]."""
    return packed[..., :head_dim], packed.view(torch.float32)[..., -1]


def lse_weighted_combine_ref(
    outs: torch.Tensor, lses: torch.Tensor, *, is_lse_base_on_e: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge [N, T, H, D] with [N, T, H]; both results stay in the compute dtype."""
    weights, merged_lse = _shard_weights(_compute(outs, lses), is_lse_base_on_e)
    live = torch.isfinite(lses).unsqueeze(-1)
    # where, not multiplication by 0: an empty shard may hold NaN or inf.
    values = torch.where(live, outs.to(weights.dtype), 0)
    return _sum_in_rank_order(values * weights.unsqueeze(-1)), merged_lse


def correct_attn_out_ref(
    out: torch.Tensor, lses: torch.Tensor, rank: int, *, is_lse_base_on_e: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale ``out`` [T, H, D] by this rank's weight among ``lses`` [N, T, H]."""
    weights, merged_lse = _shard_weights(_compute(out, lses), is_lse_base_on_e)
    live = torch.isfinite(lses[rank]).unsqueeze(-1)
    values = torch.where(live, out.to(weights.dtype), 0)
    return values * weights[rank].unsqueeze(-1), merged_lse


def merge_two_states_ref(
    o_a: torch.Tensor,
    lse_a: torch.Tensor,
    o_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states [T, H, D] with LSE [T, H]."""
    return lse_weighted_combine_ref(
        torch.stack([o_a, o_b]),
        torch.stack([lse_a, lse_b]),
        is_lse_base_on_e=is_lse_base_on_e,
    )


def cut_partials_ref(out: torch.Tensor, world_size: int, rank: int) -> torch.Tensor:
    """Cut [T, H, ...] by head into [N, T, H / N, ...]; drop slice ``rank``."""
    own_heads = out.shape[1] // world_size
    by_rank = out.unflatten(1, (world_size, own_heads)).movedim(1, 0)
    return torch.cat([by_rank[:rank], by_rank[rank + 1 :]]).contiguous()


def pack_partials_ref(
    out: torch.Tensor, lse: torch.Tensor, world_size: int, rank: int
) -> torch.Tensor:
    """Cut [T, H, D] and [T, H] into [N - 1, T, H / N, width]; padding is zero."""
    outs = cut_partials_ref(out, world_size, rank)
    head_dim = out.shape[-1]
    packed = out.new_zeros(*outs.shape[:-1], packed_width(head_dim, out.dtype))
    payload, packed_lse = split_packed(packed, head_dim)
    payload.copy_(outs)
    packed_lse.copy_(cut_partials_ref(lse, world_size, rank))
    return packed


def combine_with_peers_ref(
    outs: torch.Tensor,
    lses: torch.Tensor,
    own: torch.Tensor,
    own_lse: torch.Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge peers' [N - 1, T, h, D] with the own [T, h, D], which is number ``rank``.

    ``lses`` is [N - 1, T, h] of the peers, or [N, T, h] with the own among them.
    """
    if lses.shape[0] == outs.shape[0]:
        lses = torch.cat([lses[:rank], own_lse[None], lses[rank:]])
    return lse_weighted_combine_ref(
        torch.cat([outs[:rank], own[None], outs[rank:]]),
        # The same bits wherever the LSEs came from: torch's exp depends on strides.
        lses.contiguous(),
        is_lse_base_on_e=is_lse_base_on_e,
    )


def interleave_heads_ref(gathered: torch.Tensor) -> torch.Tensor:
    """[N, T, h, D] -> [T, N * h, D]."""
    return gathered.movedim(0, 1).flatten(1, 2).contiguous()


def _compute(outs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
    return lses.to(torch.float64 if outs.dtype == torch.float64 else torch.float32)


def _sum_in_rank_order(parts: torch.Tensor) -> torch.Tensor:
    # The order of torch's own sum depends on sizes and strides.
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
    # With every shard empty total is 0: log gives the LSE of an empty set, and the
    # division must not make 0 / 0.
    return raw / total.masked_fill(empty.all(0), 1.0), peak + log(total)
