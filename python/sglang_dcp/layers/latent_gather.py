"""MLA prefill by MHA: latents from all ranks and in order, on each of them.

Latents are one head for all query heads, so that those of a request are small beside the
queries and partial outputs of a prefill chunk, which the exchange would carry:
`positions x 576` numbers against `chunk x heads x 1088` for DeepSeek's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_dcp.layers.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.local_view import Shard


def gathering_moves_less(
    positions: int, new: int, *, shard_heads: int, latent: int, rope: int
) -> bool:
    """Whether `positions` are fewer numbers than what `new` tokens of them would exchange.

    These are the queries and the partial outputs of all `shard_heads` heads of the
    attn_tp shard. From logical lengths, so that all ranks agree. Numbers, not bytes: fp8
    latents would pay up to twice as many.
    """
    key = latent + rope
    return positions * key <= new * shard_heads * (key + latent)


def cut_prefixes(prefix: Sequence[int], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts and lengths of each request in pieces of at most `most` positions in all.

    Returns two tensors [pieces, requests] int32 on the host. The prefixes are laid end to
    end and cut: as few pieces as can be, and each request's part of one is contiguous.
    """
    lens = torch.tensor(prefix)
    ends = lens.cumsum(0)
    cuts = torch.arange(0, int(ends[-1]), most)[:, None]
    starts = (cuts - (ends - lens)).clamp(min=0).minimum(lens)
    stops = (cuts + most - (ends - lens)).clamp(min=0).minimum(lens)
    return starts.int(), (stops - starts).int()


class LatentPlan(NamedTuple):
    """Of a batch's requests, or of one piece of their prefixes, for all layers.

    Attributes
    ----------
    slots : Tensor [rows] int64
        This rank's positions, request after request; as many rows as on the rank with
        most, padded with the dummy slot.
    order : Tensor [positions] int64
        Into the rows of all ranks: request after request, each in the order of its
        positions.
    """

    slots: torch.Tensor
    order: torch.Tensor


def plan_latents(
    shard: Shard, rows: torch.Tensor, starts: torch.Tensor, lens: torch.Tensor
) -> LatentPlan:
    """Plan for `lens` positions from `starts` on of each request; waits for no GPU.

    Parameters
    ----------
    rows : Tensor [requests]
        Of SGLang's slot table.
    starts, lens : Tensor [requests]
        On the host; logical, the same on all ranks.
    """
    starts, lens = starts.long(), lens.long()
    # [ranks, requests]: local positions before the piece, and in it.
    before = _on_each_rank(starts, shard.dcp_size)
    held = _on_each_rank(starts + lens, shard.dcp_size) - before
    padded = int(held.sum(1).max())
    own = shard.kvp_rank
    return LatentPlan(
        _slots(shard, rows, before[own], held[own], padded),
        _order(shard, before, held, starts, lens, padded),
    )


def _on_each_rank(lens: torch.Tensor, dcp_size: int) -> torch.Tensor:
    return torch.stack([local_lens(lens, dcp_size, rank) for rank in range(dcp_size)])


def _slots(
    shard: Shard,
    rows: torch.Tensor,
    before: torch.Tensor,
    held: torch.Tensor,
    padded: int,
) -> torch.Tensor:
    device = shard.table.device
    request, place = _ragged(held, device)
    local = before.to(device, non_blocking=True)[request] + place
    # The local table of a prefill ends with the prefix, before new tokens.
    position = local * shard.dcp_size + shard.kvp_rank
    slots = shard.table[rows[request], position].long() // shard.dcp_size
    return torch.nn.functional.pad(slots, (0, padded - len(slots)), value=DUMMY_SLOT)


def _order(
    shard: Shard,
    before: torch.Tensor,
    held: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    padded: int,
) -> torch.Tensor:
    device, dcp_size = shard.table.device, shard.dcp_size
    request, place = _ragged(lens, device)
    # Of local position 0, had the rank sent it: where the request's rows begin.
    origins = held.cumsum(1) - held - before
    origins = origins.to(device, non_blocking=True)
    position = starts.to(device, non_blocking=True)[request] + place
    owner = position % dcp_size
    return owner * padded + origins[owner, request] + position // dcp_size


def _ragged(
    lens: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and place in it of each of `sum(lens)` rows; `lens` is on the host."""
    rows = int(lens.sum())
    firsts = lens.cumsum(0) - lens
    lens, firsts = torch.stack([lens, firsts]).to(device, non_blocking=True)
    each = torch.arange(len(lens), device=device)
    request = each.repeat_interleave(lens, output_size=rows)
    return request, torch.arange(rows, device=device) - firsts[request]


def gather_latents(
    plan: LatentPlan, stored: torch.Tensor, latent: int, exchange: Exchange
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [positions, latent] and rotary keys [positions, rope], each contiguous.

    `stored` [slots, 1, latent + rope] is the pool; the same dtype.
    """
    # In fp8, bytes: not every operator knows the type.
    raw = stored if stored.itemsize > 1 else stored.view(torch.uint8)
    every = exchange.gather_rows(raw[plan.slots].flatten(1))
    parts = every.tensor_split([latent], dim=1)
    found, rope = (part[plan.order].view(stored.dtype) for part in parts)
    return found, rope
