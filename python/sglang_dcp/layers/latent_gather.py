"""MLA prefill over the whole prefix: the latents of all ranks, in order, on each of them.

Latents are one head for all query heads, so that a prefix is small beside the queries and
partial outputs of a prefill chunk, which the exchange would carry: `prefix x 576` numbers
against `chunk x heads x 1088` for DeepSeek's sizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch

from sglang_dcp.layers.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.local_view import Shard

# Positions of a prefill batch that are gathered: of DeepSeek's latents in 16 bits 0.6 GB,
# which a layer holds three times. A longer prefix stays where it is.
GATHERED_POSITIONS = 1 << 19


class Gathers(NamedTuple):
    """Which prefixes are gathered; decided from logical lengths, the same on all ranks.

    Attributes
    ----------
    most : int
        Positions of a batch, prefix and new; 0 where nothing is ever gathered.
    per_token : float
        Prefix positions whose latents are as large as what one new token moves where the
        prefix stays: its queries and partial outputs, of all heads of the shard.
    """

    most: int
    per_token: float = math.inf

    @classmethod
    def of_model(cls, shard_heads: int, latent: int, rope: int) -> Gathers:
        """For `shard_heads` query heads over latents of `latent + rope` numbers."""
        key = latent + rope
        return cls(GATHERED_POSITIONS, shard_heads * (key + latent) / key)

    def allow(self, prefix: int, new: int) -> bool:
        return prefix + new <= self.most and prefix <= self.per_token * new


NO_GATHERS = Gathers(0)


class LatentPlan(NamedTuple):
    """Of one forward, for all its layers.

    Attributes
    ----------
    slots : Tensor [rows] int64
        This rank's prefix, request after request; as many rows as on the rank with most,
        padded with the dummy slot.
    order : Tensor [prefix and new tokens] int64
        Into the rows of all ranks followed by the new tokens: request after request, each
        in the order of its positions.
    """

    slots: torch.Tensor
    order: torch.Tensor


def plan_latents(
    shard: Shard, batch: ForwardBatch, gathers: Gathers
) -> Optional[LatentPlan]:
    """Plan of an extend forward, or None where no request of it has a prefix or where
    `gathers` leaves it in place; the same on all ranks. Does not wait for the GPU.
    """
    prefix, new = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    if not any(prefix) or not gathers.allow(sum(prefix), sum(new)):
        return None
    lens = torch.tensor(prefix)
    # [ranks, requests]
    held = torch.stack(
        [local_lens(lens, shard.dcp_size, rank) for rank in range(shard.dcp_size)]
    )
    padded = int(held.sum(1).max())
    return LatentPlan(
        _slots(shard, batch.req_pool_indices, held[shard.kvp_rank], padded),
        _order(shard, held, lens, torch.tensor(new), padded),
    )


def _slots(
    shard: Shard, rows: torch.Tensor, held: torch.Tensor, padded: int
) -> torch.Tensor:
    device = shard.local_table.device
    request, position = _ragged(held, device)
    slots = shard.local_table[rows[request], position].long()
    return torch.nn.functional.pad(slots, (0, padded - len(slots)), value=DUMMY_SLOT)


def _order(
    shard: Shard,
    held: torch.Tensor,
    prefix: torch.Tensor,
    new: torch.Tensor,
    padded: int,
) -> torch.Tensor:
    device, dcp_size = shard.local_table.device, shard.dcp_size
    request, position = _ragged(prefix + new, device)
    firsts = (held.cumsum(1) - held).to(device, non_blocking=True)
    # Of the new token at position 0, had the request no prefix.
    origin = dcp_size * padded + new.cumsum(0) - new - prefix
    starts, ends = torch.stack([origin, prefix]).to(device, non_blocking=True)
    owner = position % dcp_size
    old = owner * padded + firsts[owner, request] + position // dcp_size
    return torch.where(position < ends[request], old, starts[request] + position)


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


def whole_latents(
    plan: LatentPlan, stored: torch.Tensor, new: torch.Tensor, exchange: Exchange
) -> torch.Tensor:
    """Keys of each request, prefix and new tokens: [sum of lengths, 1, qk_dim].

    Parameters
    ----------
    stored : Tensor [slots, 1, qk_dim]
        This rank's pool; fp8 latents come back in `new`'s dtype.
    new : Tensor [tokens, 1, qk_dim]
        From the projection.
    """
    # In fp8, bytes: not every operator knows the type.
    raw = stored if stored.itemsize > 1 else stored.view(torch.uint8)
    every = exchange.gather_rows(raw[plan.slots].flatten(1)).view(stored.dtype)
    return torch.cat([every.to(new.dtype), new.flatten(1)])[plan.order].unsqueeze(1)
