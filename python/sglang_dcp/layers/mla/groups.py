"""An MLA prefill by group: which requests keep their prefix in place, and what it takes.

A long chunk takes least time expanded, a short turn on a long prefix takes least in place.
In a batch of both, new tokens attend to themselves expanded. Then some prefixes are
attended to in place, in latents, and all others are gathered and expanded in chunks.

Pure functions of logical lengths, which are the same on all ranks. So all ranks make the
same groups, and issue the same collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import NamedTuple, Optional

from sglang_dcp.layers.mla import cost
from sglang_dcp.layers.mla.cost import MlaSizes, Requests
from sglang_dcp.layers.prefix.rates import Rates

# Attention backends whose servers with prefills by group were compared with tp 1 on GPUs, and
# timed. None was timed yet. CPUs absorb every prefill.
SERVED: frozenset[str] = frozenset()
# New tokens of the requests that stay. What they exchange lives beside the new tokens'
# expanded keys, which no other form holds at once (`forward_memory`).
MOST_IN_PLACE_TOKENS = 2048


class Groups(NamedTuple):
    """A prefill by group.

    Attributes
    ----------
    stays : whether the prefix of each request stays in place
    seconds : what a layer takes
    """

    stays: Sequence[bool]
    seconds: float


def best_groups(
    requests: Requests, most_gathered: int, capacity: int, sizes: MlaSizes, rates: Rates
) -> Optional[Groups]:
    """Share out the requests of a prefill; None if none would stay, or too much be gathered.

    Whether nothing is left to gather, which saves launches, is known of a group only. So
    two ways are tried: each request as it gains, and all in place.

    Parameters
    ----------
    most_gathered : most positions that may be gathered
    capacity : most positions of a prefix chunk
    """
    all_in_place = [prefix > 0 for prefix in requests.prefix]
    ways = [requests_in_place(requests, sizes, rates), all_in_place]
    found: list[Groups] = []
    for wanted in ways:
        stays = shortest_turns(requests.new, wanted)
        in_place = Requests(*(list(compress(lens, stays)) for lens in requests))
        gathered = gathered_prefixes(requests.prefix, stays)
        if in_place.new and sum(gathered) <= most_gathered:
            parts = requests.new, in_place, gathered
            seconds = by_group_seconds(*parts, capacity, sizes, rates)
            found.append(Groups(stays, seconds))
    return min(found, key=attrgetter("seconds"), default=None)


def requests_in_place(
    requests: Requests, sizes: MlaSizes, rates: Rates
) -> Sequence[bool]:
    """Tell of each request whether its prefix stays on its ranks.

    Each takes the way that adds less to a GPU whose SMs are all at work. Launches and idle
    SMs are those of a whole batch, and count in `by_group_seconds`.
    """
    adds = cost.marginal(sizes, rates)
    return [adds.gains_in_place(new, prefix) for new, prefix in zip(*requests)]


def shortest_turns(new: Sequence[int], wanted: Sequence[bool]) -> Sequence[bool]:
    """Keep of the `wanted` requests those with fewest new tokens, as many as may stay."""
    stays, tokens = [False] * len(new), 0
    for request in sorted(range(len(new)), key=new.__getitem__):
        if wanted[request] and tokens + new[request] <= MOST_IN_PLACE_TOKENS:
            stays[request] = True
            tokens += new[request]
    return stays


def by_group_seconds(
    new: Sequence[int],
    in_place: Requests,
    gathered: Sequence[int],
    capacity: int,
    sizes: MlaSizes,
    rates: Rates,
) -> float:
    """Time a prefill by group.

    Parameters
    ----------
    new : new tokens of all requests
    in_place : the requests whose prefix stays in place
    gathered : positions of each request that are gathered
    capacity : most positions of a prefix chunk
    """
    others = Requests(new, gathered)
    return (
        cost.new_expanded_seconds(others, sizes, rates)
        + cost.absorb_seconds(in_place.new, sizes, rates)
        + cost.prefix_in_place_seconds(in_place, sizes, rates)
        + cost.prefix_gathered_seconds(others, capacity, sizes, rates)
        # Rows of the group are taken out, merged and put back.
        + rates.chunk_host_s
    )


def gathered_prefixes(prefix: Sequence[int], stays: Sequence[bool]) -> list[int]:
    """Return how many positions of each request are gathered: all or none."""
    return [0 if stay else length for length, stay in zip(prefix, stays)]
