"""Row layout and merge of an exchange in plain torch: the CPU path and the reference.

Each kernel of ``partials_triton`` must give the result of a function here.
"""

from __future__ import annotations

import torch

from sglang_dcp.ops.lse_merge_torch import lse_weighted_combine_torch

ROW_ALIGN_BYTES = 16
LSE_BYTES = 4


def packed_width(head_dim: int, dtype: torch.dtype) -> int:
    """Count the elements of one packed row: ``head_dim`` values, padding, 4 bytes of LSE.

    A row is a multiple of 16 bytes for every ``head_dim`` and dtype, so that the widest
    vector load can start at each row. The LSE is in the last 4 bytes, so that it is
    float32-aligned even if ``head_dim`` is odd.
    """
    return packed_bytes(head_dim, dtype.itemsize) // dtype.itemsize


def packed_bytes(head_dim: int, itemsize: int) -> int:
    """Return the bytes of a packed row of ``head_dim`` values of ``itemsize`` bytes."""
    used_bytes = head_dim * itemsize + LSE_BYTES
    return -(-used_bytes // ROW_ALIGN_BYTES) * ROW_ALIGN_BYTES


def split_packed(
    packed: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """View packed rows [..., width] as payload [..., head_dim] and fp32 LSE [...]."""
    return packed[..., :head_dim], packed.view(torch.float32)[..., -1]


def slice_for_peers_torch(
    out: torch.Tensor, world_size: int, rank: int
) -> torch.Tensor:
    """Slice [T, H, ...] by head into [N, T, H / N, ...], then drop slice ``rank``."""
    local_heads = out.shape[1] // world_size
    by_rank = out.unflatten(1, (world_size, local_heads)).movedim(1, 0)
    return torch.cat([by_rank[:rank], by_rank[rank + 1 :]]).contiguous()


def pack_partials_torch(
    out: torch.Tensor, lse: torch.Tensor, world_size: int, rank: int
) -> torch.Tensor:
    """Pack [T, H, D] and [T, H] into [N - 1, T, H / N, width]; padding is zero."""
    outs = slice_for_peers_torch(out, world_size, rank)
    head_dim = out.shape[-1]
    packed = out.new_zeros(*outs.shape[:-1], packed_width(head_dim, out.dtype))
    payload, packed_lse = split_packed(packed, head_dim)
    payload.copy_(outs)
    packed_lse.copy_(slice_for_peers_torch(lse, world_size, rank))
    return packed


def combine_with_peers_torch(
    outs: torch.Tensor,
    lses: torch.Tensor,
    own: torch.Tensor,
    own_lse: torch.Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the peers' [N - 1, T, h, D] with this rank's ``own`` [T, h, D], in rank order.

    ``lses`` is [N - 1, T, h] of the peers, or [N, T, h] of all ranks.
    """
    if lses.shape[0] == outs.shape[0]:
        lses = torch.cat([lses[:rank], own_lse[None], lses[rank:]])
    return lse_weighted_combine_torch(
        torch.cat([outs[:rank], own[None], outs[rank:]]),
        # torch.exp may give other bits for other strides.
        lses.contiguous(),
        is_lse_base_on_e=is_lse_base_on_e,
    )


def interleave_heads_torch(gathered: torch.Tensor) -> torch.Tensor:
    """Reorder [N, T, h, D] to contiguous [T, N * h, D]."""
    return gathered.movedim(0, 1).flatten(1, 2).contiguous()
