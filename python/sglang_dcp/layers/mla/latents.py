"""Gathers latents for an expanded MLA prefill: from all ranks, in the order of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_dcp.ops.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.local_batch_types import Shard


def split_into_chunks(
    prefix: Sequence[int], most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split prefixes into chunks of at most `most` positions each.

    The prefixes are laid end to end and cut. So there are as few chunks as possible, and
    each request's part of a chunk is contiguous.

    Returns
    -------
    starts, lens : Tensor [chunks, requests] int32, on the host
        First position and number of positions of each request in each chunk.
    """
    lens = torch.tensor(prefix)
    ends = lens.cumsum(0)
    cuts = torch.arange(0, int(ends[-1]), most)[:, None]
    starts = (cuts - (ends - lens)).clamp(min=0).minimum(lens)
    stops = (cuts + most - (ends - lens)).clamp(min=0).minimum(lens)
    return starts.int(), (stops - starts).int()


class LatentPlan(NamedTuple):
    """How to gather the latents of whole requests or of one prefix chunk, for all layers.

    Attributes
    ----------
    slots : Tensor [rows] int64
        Local slots of this rank's positions, request after request. Padded with the
        dummy slot to the number of rows of the rank with most.
    order : Tensor [positions] int64
        Index into the rows of all ranks, in rank order. It puts request after request,
        each in the order of its positions.
    """

    slots: torch.Tensor
    order: torch.Tensor


def plan_latents(
    shard: Shard, rows: torch.Tensor, starts: torch.Tensor, lens: torch.Tensor
) -> LatentPlan:
    """Plan the gather of `lens` positions of each request, from `starts` on.

    It does not wait for the GPU.

    Parameters
    ----------
    rows : Tensor [requests]
        Rows of SGLang's slot table, on the device.
    starts, lens : Tensor [requests]
        Logical positions, on the host. The same on all ranks.
    """
    starts, lens = starts.long(), lens.long()
    # [ranks, requests]: number of local positions before the chunk, and inside it.
    before = _on_each_rank(starts, shard.dcp_size)
    held = _on_each_rank(starts + lens, shard.dcp_size) - before
    padded = int(held.sum(1).max())
    own = shard.dcp_rank
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
    # SGLang's table, because the local table of a prefill ends before the new tokens.
    position = local * shard.dcp_size + shard.dcp_rank
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
    # The row that local position 0 would have, if the rank sent it too.
    origins = held.cumsum(1) - held - before
    origins = origins.to(device, non_blocking=True)
    position = starts.to(device, non_blocking=True)[request] + place
    owner = position % dcp_size
    return owner * padded + origins[owner, request] + position // dcp_size


def _ragged(
    lens: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the request of each of `sum(lens)` rows, and the row's index in it.

    `lens` is on the host, the results are on `device`.
    """
    rows = int(lens.sum())
    firsts = lens.cumsum(0) - lens
    lens, firsts = torch.stack([lens, firsts]).to(device, non_blocking=True)
    each = torch.arange(len(lens), device=device)
    request = each.repeat_interleave(lens, output_size=rows)
    return request, torch.arange(rows, device=device) - firsts[request]


def gather_latents(
    plan: LatentPlan, stored: torch.Tensor, latent: int, exchange: Exchange
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
