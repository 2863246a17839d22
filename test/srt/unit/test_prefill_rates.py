"""The rates of a prefill's estimates, against kernels that were timed alone on one H200.

Only this file compares the estimated GPU work of each form with measured times of its own:
`bench_prefill_forms.py`, one rank's part at tp 2 / dcp 2. What a call takes beside its work is
no part of an estimate.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_dcp.layers.backends.fa3_splits import FULL_TILES
from sglang_dcp.layers.mla import cost
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.layers.prefix import kv_form
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.kv_form import KvSizes
from sglang_dcp.layers.prefix.rates import HOPPER

RESULTS = Path(__file__).resolve().parents[3] / "benchmark" / "results"
HEADS, LATENTS = "Qwen3-30B-A3B/4", "DeepSeek-V2-Lite"
KV = KvSizes(4, 1, 2, 128, 128, split_below=FULL_TILES)
MLA = MlaSizes(8, 2, 512, 64, 128, 128, split_below=FULL_TILES)
# Without what was not timed: launches, links, other work of a token.
BARE = HOPPER._replace(
    gather_bytes=math.inf,
    exchange_bytes=math.inf,
    in_place_host_s=0.0,
    gather_host_s=0.0,
    chunk_host_s=0.0,
    layer_host_s=0.0,
    layer_token_s=0.0,
    kv_in_place_host_s=0.0,
    kv_gather_host_s=0.0,
)
# Of a call with its launches in a graph, and of joining splits.
CALL_US = 35
# SGLang expands no more at once.
CAPACITY = 131072


class Row(NamedTuple):
    """One line: requests of `new` tokens on `prefix` positions each, microseconds."""

    model: str
    batch: int
    prefix: int
    new: int
    in_place: float
    gathered: float
    whole: float
    expand: float
    absorb: float

    @property
    def requests(self) -> Requests:
        return Requests([self.new] * self.batch, [self.prefix] * self.batch)

    @property
    def without_prefix(self) -> Requests:
        return self.requests._replace(prefix=[0] * self.batch)


def measured(model: str) -> list[Row]:
    with (RESULTS / "2026-12-01-prefill-forms-h200.csv").open() as lines:
        rows = [list(row.values()) for row in csv.DictReader(lines)]
    return [
        Row(name, *map(int, lengths), *map(float, times))  # type: ignore[arg-type]
        for name, *numbers in rows
        if name == model
        for lengths, times in [(numbers[:3], numbers[3:])]
    ]


def ids(row: Row) -> str:
    return f"{row.batch}-{row.prefix}-{row.new}"


def is_about(
    told: float, timed: float, within: float = 0.15, call: float = CALL_US
) -> bool:
    return abs(told - timed) <= call + within * timed


def attention_to_heads(row: Row, *, gathers: bool, sizes: KvSizes = KV) -> float:
    """Microseconds of attention to the prefix alone."""
    seconds = kv_form.gathered_seconds if gathers else kv_form.in_place_seconds
    # The gather is copies in memory, and so are the partial outputs of both.
    free = BARE._replace(memory_bytes=math.inf) if gathers else BARE
    with_prefix = seconds(row.requests, sizes, free)
    return (with_prefix - seconds(row.without_prefix, sizes, free)) * 1e6


def latents_in_place(row: Row) -> float:
    rows = sum(row.requests.new) * MLA.local_heads
    dims = (MLA.latent + MLA.rope) * 2, MLA.latent * 2
    exchange = cost.exchange_seconds(rows, MLA.dcp_size, *dims, BARE)
    return (cost.prefix_in_place_seconds(row.requests, MLA, BARE) - exchange) * 1e6


def latents_gathered(row: Row, sizes: MlaSizes = MLA) -> float:
    """Microseconds of attention to the expanded prefix alone."""
    return (of_gathered(row, sizes) - expansion(row)) * 1e6


def of_gathered(row: Row, sizes: MlaSizes = MLA) -> float:
    positions = sum(row.requests.prefix)
    seconds = cost.prefix_gathered_seconds(row.requests, positions, sizes, BARE)
    return seconds - cost._gather_seconds(positions, sizes, BARE)


def expansion(row: Row) -> float:
    return cost._expand_seconds(row.requests.prefix, MLA, BARE)


@pytest.mark.parametrize("row", measured(HEADS), ids=ids)
def test_attention_to_heads_takes_what_was_measured(row: Row) -> None:
    assert is_about(attention_to_heads(row, gathers=False), row.in_place)
    assert is_about(attention_to_heads(row, gathers=True), row.gathered)


@pytest.mark.parametrize("row", measured(LATENTS), ids=ids)
def test_attention_to_latents_takes_what_was_measured(row: Row) -> None:
    assert is_about(latents_in_place(row), row.in_place)
    assert is_about(latents_gathered(row), row.gathered, 0.2)


@pytest.mark.parametrize("model", [HEADS, LATENTS])
def test_keys_that_are_not_split_take_what_was_measured(model: str) -> None:
    """Few tiles leave SMs idle. Tiles that are not full take less than is told."""
    for row in measured(model):
        if row.new < 64:
            continue
        if model == HEADS:
            whole = KV._replace(split_below=0)
            told = attention_to_heads(row, gathers=True, sizes=whole)
        else:
            told = latents_gathered(row, MLA._replace(split_below=0))
        assert is_about(told, row.whole), ids(row)


def test_expansion_takes_what_was_measured() -> None:
    """It is the same for all numbers of new tokens."""
    rows = sorted(measured(LATENTS), key=lambda row: row.batch * row.prefix)
    for count, alike in itertools.groupby(rows, lambda row: row.batch * row.prefix):
        if count <= CAPACITY:
            same = list(alike)
            median = statistics.median(row.expand for row in same)
            assert is_about(expansion(same[0]) * 1e6, median), ids(same[0])


def test_products_around_attention_in_place_take_what_was_measured() -> None:
    for row in measured(LATENTS):
        told = cost.absorb_seconds(row.requests.new, MLA, BARE) * 1e6
        assert is_about(told, row.absorb, within=0.2, call=15), ids(row)


def test_a_few_tokens_take_the_time_to_read_expanded_keys() -> None:
    """Of 524,288 positions, 2.7 GB."""
    rows = [row for row in measured(LATENTS) if row.batch * row.prefix == 524288]
    few = [row for row in rows if row.batch == 1 and row.new < 128]
    assert len(few) == 3
    for row in few:
        assert is_about(latents_gathered(row), row.gathered, 0.05, call=0), ids(row)


def tile_us(keys: int) -> float:
    """Microseconds of one SM for a tile of rows that it takes through expanded keys."""
    return 2 * 128 * keys * MLA.expanded_dims / HOPPER.tile_flops * 1e6


def test_a_long_chunk_leaves_the_keys_of_a_short_turn_beside_it_whole() -> None:
    """The chunk fills the SMs, so FA3 is asked for no splits."""
    for heads, filling in ((8, 1700), (16, 850)):
        sizes = MLA._replace(local_heads=heads)
        for new, whole in ((filling // 2, False), (filling, True)):
            mixed = Requests([new, 100], [0, 524288])
            both = [
                cost.prefix_gathered_seconds(mixed, 524288, of, BARE)
                for of in (sizes, sizes._replace(split_below=0))
            ]
            assert (both[0] == both[1]) == whole, (heads, new)
    mixed = Requests([8192, 100], [0, 524288])
    told = cost.prefix_gathered_seconds(mixed, 524288, MLA, BARE) * 1e6
    assert told > tile_us(524288)


def test_each_prefix_chunk_is_gone_through_by_a_tile_of_its_own() -> None:
    whole = MLA._replace(split_below=0)
    four = Requests([1] * 4, [CAPACITY] * 4)
    rest = cost._gather_seconds(4 * CAPACITY, MLA, BARE)
    rest += cost._expand_seconds(four.prefix, MLA, BARE)
    for capacity, chunks in ((4 * CAPACITY, 1), (CAPACITY, 4)):
        told = cost.prefix_gathered_seconds(four, capacity, whole, BARE) - rest
        assert told * 1e6 == pytest.approx(chunks * tile_us(CAPACITY))


def test_one_shot_counts_all_positions_of_requests_that_differ() -> None:
    two = Requests([1, 1], [100_000, 20_000])
    positions = sum(two.new) + sum(two.prefix)
    rest = cost._gather_seconds(positions, MLA, BARE)
    rest += cost._expand_seconds([positions], MLA, BARE)
    told = cost.one_shot_seconds(two, MLA, BARE) - rest
    read = positions * MLA.local_heads * MLA.expanded_dims * 2 / BARE.memory_bytes
    assert told == pytest.approx(read)
    told = cost.one_shot_seconds(two, MLA._replace(split_below=0), BARE) - rest
    assert told * 1e6 == pytest.approx(tile_us(100_001))


def test_of_both_forms_the_one_that_was_faster_is_told() -> None:
    """The work of the GPU alone. The forms differ by a fifth at least."""
    told = set()
    for row in measured(LATENTS):
        in_place, gathered = row.in_place + row.absorb, row.gathered + row.expand
        if max(in_place, gathered) < 1.2 * min(in_place, gathered):
            continue
        absorb = cost.absorb_seconds(row.requests.new, MLA, BARE) * 1e6
        stays = latents_in_place(row) + absorb < of_gathered(row) * 1e6
        assert stays == (in_place < gathered), ids(row)
        told.add(stays)
    assert told == {True, False}


def test_splits_never_take_much_longer_than_none() -> None:
    """So a backend that can split does."""
    for row in (*measured(HEADS), *measured(LATENTS)):
        assert row.gathered < 1.15 * row.whole, ids(row)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
