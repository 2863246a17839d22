"""The attention of chains in plain torch: the CPU path, and the reference of the kernel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sglang_dcp.ops.lse_merge_torch import merge_two_states_torch

if TYPE_CHECKING:
    from sglang_dcp.ops.chains import Chains, ChainSizes


def attend_chains_torch(
    chains: Chains, prefix: Tensor, prefix_lse: Tensor, sizes: ChainSizes
) -> Tensor:
    """Do what `chains.attend_chains` does, in float32."""
    q, k, v, q_rope, k_rope = chains
    width, scaling, first_head, heads_of_kv, is_lse_base_on_e = sizes
    if q_rope is not None and k_rope is not None:
        q, k = torch.cat([q, q_rope], dim=-1), torch.cat([k, k_rope], dim=-1)
    kv = (first_head + torch.arange(q.shape[1], device=q.device)) // heads_of_kv
    # [requests, heads, width, dim]
    q, k, v = (
        rows.float().unflatten(0, (-1, width)).transpose(1, 2)
        for rows in (q, k[:, kv], v[:, kv])
    )
    scores = q @ k.transpose(2, 3) * scaling
    later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)
    lse = scores.logsumexp(-1).transpose(1, 2).flatten(0, 1)
    if not is_lse_base_on_e:
        lse = lse / math.log(2)
    merged, _ = merge_two_states_torch(
        out, lse, prefix.float(), prefix_lse, is_lse_base_on_e=is_lse_base_on_e
    )
    return merged.to(prefix.dtype)
