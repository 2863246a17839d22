"""How long each form of an MLA prefill takes: pure functions of logical lengths.

All times are seconds of one layer on one rank. Work that every form has alike is left out.
A form costs its FLOPs, its bytes and its launches, one after the other: an estimate to
compare forms by, not to predict a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_dcp.layers.prefix.cost import (
    FLOPS,
    Requests,
    exchange_seconds,
    gather_seconds,
    ragged_attention_seconds,
    tiled_pairs,
)
from sglang_dcp.layers.prefix.rates import Rates

# Copies of the latents in memory: taken from the pool, received, put in order. Each is
# written and read once.
_GATHER_PASSES = 6


class MlaSizes(NamedTuple):
    """Sizes of a rank's attention.

    Attributes
    ----------
    local_heads : query heads of the rank
    dcp_size : ranks that share them out
    latent, rope, nope, v : dims of a latent, of its rotary key, and of an expanded head
    itemsize : bytes of a number of queries, outputs and expanded keys
    stored_itemsize : bytes of a number in the pool
    split_below : tiles of query rows of a request below which the kernel splits expanded
        keys; 0 if it never does
    """

    local_heads: int
    dcp_size: int
    latent: int
    rope: int
    nope: int
    v: int
    itemsize: int = 2
    stored_itemsize: int = 2
    split_below: float = 0

    @property
    def group_heads(self) -> int:
        return self.local_heads * self.dcp_size

    @property
    def absorbed_dims(self) -> int:
        """Multiplications of absorbed attention for each query, key and head."""
        return self.latent + self.rope + self.latent

    @property
    def expanded_dims(self) -> int:
        """The same of attention to expanded keys."""
        return self.nope + self.rope + self.v


def in_place_seconds(requests: Requests, sizes: MlaSizes, rates: Rates) -> float:
    """Time the absorbed form: queries travel, the prefix stays."""
    causal = sum(new * new for new in requests.new) / 2
    flops = FLOPS * causal * sizes.local_heads * sizes.absorbed_dims
    new = flops / rates.absorbed_flops + absorb_seconds(requests.new, sizes, rates)
    return new + prefix_in_place_seconds(requests, sizes, rates)


def one_shot_seconds(requests: Requests, sizes: MlaSizes, rates: Rates) -> float:
    """Time the expanded form with all positions in one call."""
    positions = [sum(both) for both in zip(*requests)]
    # A causal call skips the keys behind each query.
    skipped = sum(new * new for new in requests.new) / 2
    pairs = tiled_pairs(requests.new, positions, rates.expanded_tile)
    return (
        _gather_seconds(sum(positions), sizes, rates)
        + _expand_seconds(positions, sizes, rates)
        + _expanded_attention(
            pairs - skipped, sum(positions), max(positions), requests.new, sizes, rates
        )
        + rates.gather_host_s
    )


def prefix_chunks_seconds(
    requests: Requests, capacity: int, sizes: MlaSizes, rates: Rates
) -> float:
    """Time the expanded form with new tokens first, then the prefix in chunks."""
    return new_expanded_seconds(requests, sizes, rates) + prefix_gathered_seconds(
        requests, capacity, sizes, rates
    )


def new_expanded_seconds(requests: Requests, sizes: MlaSizes, rates: Rates) -> float:
    """Time the new tokens' attention to themselves, expanded. No kernel splits them."""
    if not sum(requests.new):
        return 0.0
    pairs = sum(new * new for new in requests.new) / 2
    attention = ragged_attention_seconds(
        pairs * sizes.local_heads, max(requests.new), sizes.expanded_dims, rates
    )
    return _expand_seconds(requests.new, sizes, rates) + attention


def absorb_seconds(new: Sequence[int], sizes: MlaSizes, rates: Rates) -> float:
    """Time the products that absorb queries and bring outputs back from latents."""
    return _expand_flops(new, sizes) / rates.gemm_flops


def prefix_in_place_seconds(requests: Requests, sizes: MlaSizes, rates: Rates) -> float:
    """Time absorbed attention to the prefix, and the exchange; 0 without a prefix."""
    if not sum(requests.prefix):
        return 0.0
    rows = [new * sizes.group_heads for new in requests.new]
    pairs = tiled_pairs(rows, requests.prefix, rates.absorbed_tile) / sizes.dcp_size
    attention = FLOPS * sizes.absorbed_dims * pairs / rates.absorbed_flops
    stored = sum(requests.prefix) / sizes.dcp_size * (sizes.latent + sizes.rope)
    read = stored * sizes.stored_itemsize / rates.memory_bytes
    exchange = _exchange_seconds(sum(requests.new), sizes, rates)
    return max(attention, read) + exchange + rates.in_place_host_s


def prefix_gathered_seconds(
    requests: Requests, capacity: int, sizes: MlaSizes, rates: Rates
) -> float:
    """Time gathering and expanding the prefix, and attention to it; 0 without a prefix."""
    prefix = sum(requests.prefix)
    if not prefix:
        return 0.0
    chunks = -(-prefix // capacity)
    longest = min(chunks * min(max(requests.prefix), capacity), prefix)
    pairs = tiled_pairs(requests.new, requests.prefix, rates.expanded_tile)
    host = rates.gather_host_s + (chunks - 1) * rates.chunk_host_s
    return (
        _gather_seconds(prefix, sizes, rates)
        + _expand_seconds(requests.prefix, sizes, rates)
        + _expanded_attention(pairs, prefix, longest, requests.new, sizes, rates)
        + host
    )


class Marginal(NamedTuple):
    """What a request adds to a GPU whose SMs are all at work, without launches: seconds.

    Attributes
    ----------
    token : of a new token in place: absorbed, exchanged
    row_pair : of a key and a query of one head in place; rows fill tiles of `row_tile`
    read : of a position that is read in place
    position : of a position that is gathered and expanded
    token_pair : of a gathered position and a new token; tokens fill tiles of `token_tile`
    rows : query rows of a new token in place
    """

    token: float
    row_pair: float
    read: float
    position: float
    token_pair: float
    rows: int
    row_tile: int
    token_tile: int

    def gains_in_place(self, new: int, prefix: int) -> bool:
        """Whether a request takes less in place than gathered."""
        rows = -(-new * self.rows // self.row_tile) * self.row_tile
        tokens = -(-new // self.token_tile) * self.token_tile
        in_place = new * self.token + prefix * max(rows * self.row_pair, self.read)
        return in_place < prefix * (self.position + tokens * self.token_pair)


def marginal(sizes: MlaSizes, rates: Rates) -> Marginal:
    """Return what each part of a request adds."""
    stored = (sizes.latent + sizes.rope) * sizes.stored_itemsize / sizes.dcp_size
    absorbed = FLOPS * sizes.absorbed_dims / rates.absorbed_flops
    expanded = FLOPS * sizes.expanded_dims / rates.expanded_flops
    return Marginal(
        token=absorb_seconds([1], sizes, rates) + _exchange_seconds(1, sizes, rates),
        row_pair=absorbed / sizes.dcp_size,
        read=stored / rates.memory_bytes,
        position=_gather_seconds(1, sizes, rates) + _expand_seconds([1], sizes, rates),
        token_pair=expanded * sizes.local_heads,
        rows=sizes.group_heads,
        row_tile=rates.absorbed_tile,
        token_tile=rates.expanded_tile,
    )


def _expanded_attention(
    pairs: float,
    keys: int,
    longest: int,
    new: Sequence[int],
    sizes: MlaSizes,
    rates: Rates,
) -> float:
    """Time attention to expanded keys, whose K and V are read at least once.

    Parameters
    ----------
    pairs : pairs of query token and key
    keys, longest : keys of all requests, and most keys of one
    new : new tokens of each request
    """
    heads, dims = sizes.local_heads, sizes.expanded_dims
    tiles = heads * -(-max(new) // rates.expanded_tile)
    whole = 0 if tiles < sizes.split_below else longest
    attention = ragged_attention_seconds(pairs * heads, whole, dims, rates)
    read = keys * heads * dims * sizes.itemsize / rates.memory_bytes
    return max(attention, read)


def _expand_flops(positions: Sequence[int], sizes: MlaSizes) -> float:
    heads = sizes.local_heads * (sizes.nope + sizes.v)
    return float(FLOPS * sum(positions) * sizes.latent * heads)


def _expand_seconds(positions: Sequence[int], sizes: MlaSizes, rates: Rates) -> float:
    """Time the product that expands latents, and the copy of K behind it."""
    product = sizes.nope + sizes.v
    # The product is written. Its part of K is read and written beside the rotary key.
    copied = product + sizes.nope + sizes.nope + sizes.rope
    numbers = sum(positions) * sizes.local_heads * copied
    moved = numbers * sizes.itemsize / rates.memory_bytes
    return _expand_flops(positions, sizes) / rates.gemm_flops + moved


def _gather_seconds(positions: int, sizes: MlaSizes, rates: Rates) -> float:
    row = (sizes.latent + sizes.rope) * sizes.stored_itemsize
    return gather_seconds(row, positions, sizes.dcp_size, _GATHER_PASSES, rates)


def _exchange_seconds(new: int, sizes: MlaSizes, rates: Rates) -> float:
    """Time the gather of queries and the exchange of partial outputs."""
    query = (sizes.latent + sizes.rope) * sizes.itemsize
    out = sizes.latent * sizes.itemsize
    rows = new * sizes.local_heads
    return exchange_seconds(rows, sizes.dcp_size, query, out, rates)
