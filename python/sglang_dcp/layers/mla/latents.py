"""Gathers latents for an expanded MLA prefill: from all ranks, in the order of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.prefix.gather import GatherPlan


def gather_latents(
    plan: GatherPlan, stored: torch.Tensor, latent: int, exchange: Exchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather what `plan` names; a collective over the DCP group.

    `stored` [slots, 1, latent + rope] is this rank's pool. Returns latents
    [positions, latent] and rotary keys [positions, rope], contiguous, in its dtype.
    """
    # fp8 goes as bytes, because not every operator knows the dtype.
    raw = stored if stored.itemsize > 1 else stored.view(torch.uint8)
    every = exchange.gather_rows(raw[plan.slots].flatten(1))
    parts = every.tensor_split([latent], dim=1)
    found, rope = (part[plan.order].view(stored.dtype) for part in parts)
    return found, rope
