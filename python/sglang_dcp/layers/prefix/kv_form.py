"""The form of a prefill over a prefix of K/V heads: pure functions of logical lengths.

- In place, queries are gathered, each rank attends to its part of the prefix, and partial
  outputs are exchanged.
- Gathered, each rank receives the K and V that its local query heads need, and attends to
  the whole prefix.

Logical lengths are the same on all ranks, so all ranks choose the same form and issue the
same collectives.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from sglang_dcp.layers.prefix.cost import (
    FLOPS,
    Requests,
    exchange_seconds,
    gather_seconds,
    ragged_attention_seconds,
    tiled_pairs,
)
from sglang_dcp.layers.prefix.rates import HOPPER, Rates
from sglang_dcp.ops.layout import kv_windows, most_kept_kv_heads

# Attention backends whose servers with gathered K/V were compared with tp 1 on GPUs, and the
# first release on which they were. CPUs gather whatever stands here.
SERVED = frozenset({"fa3", "flashinfer", "triton"})
SERVED_SINCE = "0.5.23"

# Of the K and V that the layers of one gather attend to. With those sent and received they
# hold up to three times this: not more than FA3's splits and the exchange take in place.
# Turns on longer prefixes stay in place, though gathered they might take less time.
MOST_GATHERED_BYTES = 128 << 20

# K and V are taken from the pool, packed, received, put in order. Each copy is written and
# read once.
_GATHER_PASSES = 8


class KvForm(enum.Enum):
    """How the new tokens of a prefill attend to their prefix."""

    IN_PLACE = "in place"
    GATHERED = "gathered"


class KvSizes(NamedTuple):
    """Sizes of a rank's attention to K/V heads.

    Attributes
    ----------
    local_heads : query heads of the rank
    kv_heads : K/V heads in the rank's pool
    dcp_size : ranks that hold the same K/V heads
    qk, v : dims of a head
    itemsize : bytes of a number of queries and outputs, and of the pool
    split_below : tiles of query rows of a request below which the kernel splits gathered
        keys; 0 if it never does
    """

    local_heads: int
    kv_heads: int
    dcp_size: int
    qk: int
    v: int
    itemsize: int = 2
    split_below: float = 0

    @property
    def window(self) -> int:
        """K/V heads that a rank receives."""
        return kv_windows(self.local_heads, self.kv_heads, self.dcp_size)[0]

    @property
    def kept(self) -> int:
        """K/V heads that attention reads at most, copies included."""
        return most_kept_kv_heads(self.local_heads, self.kv_heads, self.dcp_size)

    def row_bytes(self, kv_heads: int) -> int:
        """Return the bytes of K and V of one position."""
        return kv_heads * (self.qk + self.v) * self.itemsize

    @property
    def most_positions(self) -> int:
        """Most cached positions of a batch that may be gathered."""
        return MOST_GATHERED_BYTES // self.row_bytes(max(self.window, self.kept))

    def layers_at_once(self, keys: int) -> int:
        """Return how many layers are gathered at once, with so many keys in order each.

        The keys are cached positions and new tokens.
        """
        return max(1, self.most_positions // keys)


def choose_kv_form(
    requests: Requests, sizes: KvSizes, *, rates: Rates = HOPPER
) -> KvForm:
    """Choose the form of a prefill. The result is the same on all ranks of the DCP group.

    A batch takes one form for all its requests, decoded tokens of mixed chunks included.
    Of forms that take as long, the one with fewer launches is chosen.
    """
    prefix = sum(requests.prefix)
    if not prefix:
        return KvForm.IN_PLACE
    seconds: dict[KvForm, float] = {}
    if prefix <= sizes.most_positions:
        seconds[KvForm.GATHERED] = gathered_seconds(requests, sizes, rates)
    seconds[KvForm.IN_PLACE] = in_place_seconds(requests, sizes, rates)
    return min(seconds, key=seconds.__getitem__)


def in_place_seconds(requests: Requests, sizes: KvSizes, rates: Rates) -> float:
    """Time a layer whose prefix stays on its ranks.

    Kernels may split the keys, so all SMs have work.
    """
    work = _in_place_work(requests, sizes, rates)
    return _layer_seconds(requests, sizes, work, rates.kv_in_place_host_s, rates)


def gathered_seconds(requests: Requests, sizes: KvSizes, rates: Rates) -> float:
    """Time a layer that gathers its prefix."""
    work = _gathered_work(requests, sizes, rates)
    return _layer_seconds(requests, sizes, work, rates.kv_gather_host_s, rates)


def added_seconds(
    requests: Requests, sizes: KvSizes, *, gathers: bool, rates: Rates = HOPPER
) -> float:
    """Time what the form of a short prefill adds to the launches of a layer.

    The further launches and the work of the GPU for the prefix count one after the other, as
    in the forms of MLA. What turns took longer than in plain TP is nearer to that than to the
    launches alone (docs/tuning.md).

    Parameters
    ----------
    gathers : whether the prefix may be gathered, or stays in place whatever takes less time
    """
    if sizes.dcp_size == 1 or not sum(requests.prefix):
        return 0.0
    if gathers and choose_kv_form(requests, sizes, rates=rates) is KvForm.GATHERED:
        return rates.kv_gather_host_s + _gathered_work(requests, sizes, rates)
    return rates.kv_in_place_host_s + _in_place_work(requests, sizes, rates)


def _in_place_work(requests: Requests, sizes: KvSizes, rates: Rates) -> float:
    """Time what the GPU does for a prefix in place, the exchange included."""
    group = sizes.local_heads * sizes.dcp_size // sizes.kv_heads
    pairs = _pairs(requests, group, sizes, rates) * sizes.kv_heads / sizes.dcp_size
    attention = FLOPS * (sizes.qk + sizes.v) * pairs / rates.expanded_flops
    stored = sum(requests.prefix) * sizes.row_bytes(sizes.kv_heads) / sizes.dcp_size
    read = stored / rates.memory_bytes
    return max(attention, read) + _exchange_seconds(requests, sizes, rates)


def _gathered_work(requests: Requests, sizes: KvSizes, rates: Rates) -> float:
    """Time what the GPU does for a prefix that is gathered, the gather included."""
    positions, kept = sum(requests.prefix), sizes.kept
    group = -(-sizes.local_heads // kept)
    pairs = _pairs(requests, group, sizes, rates) * kept
    row = sizes.row_bytes(sizes.window)
    gather = gather_seconds(row, positions, sizes.dcp_size, _GATHER_PASSES, rates)
    tiles = kept * -(-max(requests.new) * group // rates.expanded_tile)
    longest = 0 if tiles < sizes.split_below else max(requests.prefix)
    dims = sizes.qk + sizes.v
    return gather + ragged_attention_seconds(pairs, longest, dims, rates)


def _layer_seconds(
    requests: Requests, sizes: KvSizes, work: float, host: float, rates: Rates
) -> float:
    """Time a layer by its launches or by its work on the GPU, whichever takes longer.

    The host launches ahead of the GPU, so the shorter one of both is hidden.

    Parameters
    ----------
    work : seconds of the GPU for the prefix
    host : seconds of launches beyond those of plain TP
    """
    pairs = sum(new * new for new in requests.new) / 2 * sizes.local_heads
    attention = FLOPS * (sizes.qk + sizes.v) * pairs / rates.expanded_flops
    others = sum(requests.new) * rates.layer_token_s
    return max(rates.layer_host_s + host, others + attention + work)


def _exchange_seconds(requests: Requests, sizes: KvSizes, rates: Rates) -> float:
    rows = sum(requests.new) * sizes.local_heads
    numbers = sizes.qk * sizes.itemsize, sizes.v * sizes.itemsize
    return exchange_seconds(rows, sizes.dcp_size, *numbers, rates)


def _pairs(requests: Requests, group: int, sizes: KvSizes, rates: Rates) -> int:
    """Count pairs of query row and key for one K/V head, which serves `group` heads."""
    rows = [new * group for new in requests.new]
    return tiled_pairs(rows, requests.prefix, rates.expanded_tile)
