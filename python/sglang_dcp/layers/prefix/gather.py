"""Plans how stored rows of all ranks come together, in the order of positions.

The rows are latents, or K and V. The plan is index math on logical positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch

from sglang_dcp.layers.backends.base import NewBehindPrefix
from sglang_dcp.ops.layout import DUMMY_SLOT, local_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.backends.base import RaggedKeys
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


class GatherPlan(NamedTuple):
    """How to gather positions of each request, for all layers.

    Attributes
    ----------
    slots : Tensor [rows] int64
        Local slots of this rank's positions, request after request. Padded with the
        dummy slot to the number of rows of the rank with most.
    order : Tensor [positions] int64
        Index into the rows of all ranks. It puts request after request, each in the
        order of its positions. `spread_out` makes it [keys], with -1 for new tokens.
    """

    slots: torch.Tensor
    order: torch.Tensor


def plan_gather(
    shard: Shard,
    rows: torch.Tensor,
    starts: torch.Tensor,
    lens: torch.Tensor,
    *,
    own_first: bool = False,
) -> GatherPlan:
    """Plan the gather of `lens` positions of each request, from `starts` on.

    It does not wait for the GPU.

    Parameters
    ----------
    rows : Tensor [requests]
        Rows of SGLang's slot table, on the device.
    starts, lens : Tensor [requests]
        Logical positions, on the host. The same on all ranks.
    own_first : bool
        Whether `order` expects the rows of this rank before those of its peers. Else it
        expects all in rank order.
    """
    starts, lens = starts.long(), lens.long()
    # [ranks, requests]: number of local positions before the chunk, and inside it.
    before = _on_each_rank(starts, shard.dcp_size)
    held = _on_each_rank(starts + lens, shard.dcp_size) - before
    padded = int(held.sum(1).max())
    own = shard.dcp_rank
    return GatherPlan(
        _slots(shard, rows, before[own], held[own], padded),
        _order(shard, before, held, starts, lens, padded, own_first),
    )


def behind_prefix(
    prefix: Sequence[int], new: Sequence[int], device: torch.device
) -> NewBehindPrefix:
    """Lay each request's new tokens behind its prefix. It does not wait for the GPU."""
    cached, added = torch.tensor(prefix), torch.tensor(new)
    firsts = (cached + added).cumsum(0) - (cached + added)

    def rows(start: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        request, place = _ragged(lens, device)
        return start.to(device, non_blocking=True)[request] + place

    ends = torch.nn.functional.pad(cached.cumsum(0, dtype=torch.int32), (1, 0))
    return NewBehindPrefix(
        new=rows(firsts + cached, added),
        prefix=rows(firsts, cached),
        prefix_ends=ends.to(device, non_blocking=True),
    )


def spread_out(order: torch.Tensor, rows: NewBehindPrefix) -> torch.Tensor:
    """Return the `order` of a `GatherPlan` with -1 at the rows of new tokens: [keys] int64."""
    spread = order.new_full((len(rows.prefix) + len(rows.new),), -1)
    return spread.index_copy_(0, rows.prefix, order)


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
    own_first: bool,
) -> torch.Tensor:
    device, dcp_size = shard.table.device, shard.dcp_size
    request, place = _ragged(lens, device)
    # The row that local position 0 would have, if the rank sent it too.
    origins = held.cumsum(1) - held - before
    origins += _places(shard, own_first)[:, None] * padded
    origins = origins.to(device, non_blocking=True)
    position = starts.to(device, non_blocking=True)[request] + place
    return origins[position % dcp_size, request] + position // dcp_size


def _places(shard: Shard, own_first: bool) -> torch.Tensor:
    """Return where the rows of each rank lie among those of all: [ranks], on the host."""
    ranks = torch.arange(shard.dcp_size)
    if not own_first:
        return ranks
    places = ranks + (ranks < shard.dcp_rank)
    places[shard.dcp_rank] = 0
    return places


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


def empty_rows(keys: RaggedKeys, batch: ForwardBatch) -> Optional[torch.Tensor]:
    """Mark [tokens] new tokens whose request has no key; None if every request has one."""
    if all(keys.lens):
        return None
    tokens = sum(batch.extend_seq_lens_cpu)
    without = keys.ends.diff() == 0
    return without.repeat_interleave(batch.extend_seq_lens, output_size=tokens)
