"""The choice of an MLA prefill's form, against measured times and by brute force.

Times are of DeepSeek-V2-Lite's dimensions on 2 H200 (fa3, bf16, chunks of 8192 tokens).
Only this file compares the estimate behind the choice with measured times.
"""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from sglang_dcp.layers.backends.fa3_splits import FULL_TILES
from sglang_dcp.layers.mla import cost
from sglang_dcp.layers.mla.cost import MlaSizes, Requests
from sglang_dcp.layers.mla.form import (
    MOST_PREFIX_CHUNKS,
    PrefillBatch,
    PrefillForm,
    choose_prefill_form,
    expanded_form,
    expanded_seconds,
)
from sglang_dcp.layers.prefix.rates import HOPPER

CAPACITY = 1 << 17
CHUNK = 8192
LAYERS = 27
LITE = MlaSizes(8, 2, 512, 64, 128, 128)
PLAIN = LITE._replace(dcp_size=1)
SIZES = [
    MlaSizes(heads, dcp, 512, 64, 128, 128, stored_itemsize=stored, split_below=below)
    for heads, dcp, stored, below in itertools.product(
        (4, 8, 16, 64), (2, 4, 8), (1, 2), (0, FULL_TILES)
    )
]


def batch_of(new: list[int], prefix: list[int]) -> PrefillBatch:
    return PrefillBatch(Requests(new, prefix), CAPACITY)


def chosen(new: int, prefix: int, sizes: MlaSizes = LITE) -> PrefillForm:
    return choose_prefill_form(batch_of([new], [prefix]), sizes, expand_prefix=True)


def in_place(new: int, prefix: int, sizes: MlaSizes = LITE) -> float:
    return cost.in_place_seconds(Requests([new], [prefix]), sizes, HOPPER)


def gathered(new: int, prefix: int, sizes: MlaSizes = LITE) -> float:
    batch = batch_of([new], [prefix])
    return expanded_seconds(batch, expanded_form(batch), sizes, HOPPER)


def test_long_chunks_expand_whatever_the_prefix() -> None:
    forms = {chosen(CHUNK, prefix) for prefix in range(CHUNK, 1 << 20, CHUNK)}
    assert forms == {PrefillForm.ONE_SHOT, PrefillForm.PREFIX_CHUNKS}


@pytest.mark.parametrize("prefix", [131072, 262144, 524288])
def test_short_turns_on_long_prefixes_stay_in_place(prefix: int) -> None:
    assert chosen(64, prefix) is PrefillForm.ABSORBED


def test_more_prefix_than_so_many_chunks_stays_in_place() -> None:
    """Each chunk holds memory. Requests that share a prefix each gather it."""
    most = MOST_PREFIX_CHUNKS * CAPACITY
    forms = {
        prefix: choose_prefill_form(
            batch_of([CHUNK, 1], [most, prefix]), LITE, expand_prefix=True
        )
        for prefix in (0, 1)
    }
    assert forms == {0: PrefillForm.PREFIX_CHUNKS, 1: PrefillForm.ABSORBED}


def test_short_turns_on_short_prefixes_expand() -> None:
    """In place, 64 tokens over 2048 took 50 ms more than plain TP, in launches alone."""
    assert chosen(64, 2048) is PrefillForm.ONE_SHOT


@pytest.mark.parametrize(
    "total, first_in_place, extra_s", [(262144, 245760, 2.3), (524288, 245760, 55.3)]
)
def test_prefill_in_place_costs_what_was_measured(
    total: int, first_in_place: int, extra_s: float
) -> None:
    """Chunks from 245,760 positions on once stayed in place; plain TP expands them."""
    late = range(first_in_place, total, CHUNK)
    told = LAYERS * sum(in_place(CHUNK, at) - gathered(CHUNK, at) for at in late)
    assert told == pytest.approx(extra_s, rel=0.15)


def test_expanded_prefill_takes_what_plain_tp_was_measured_to_take() -> None:
    """From 262,144 to 524,288 tokens: 26.0 s."""
    chunks = range(262144, 524288, CHUNK)
    told = LAYERS * sum(gathered(CHUNK, at, PLAIN) for at in chunks)
    assert told == pytest.approx(36.3 - 10.3, rel=0.1)


def test_turns_of_64_tokens_grow_as_measured_in_plain_tp() -> None:
    """From 262,144 to 524,288 positions: 0.48 s less 0.28 s. SGLang splits no keys."""
    told = gathered(64, 524288, PLAIN) - gathered(64, 262144, PLAIN)
    assert LAYERS * told == pytest.approx(0.20, rel=0.2)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_once_a_length_expands_all_longer_ones_do(sizes: MlaSizes) -> None:
    """By brute force over whole tiles of new tokens. A long prefix stays for short turns."""
    for prefix in (1, 2048, 65536, 524288, 1 << 20):
        forms = [
            chosen(new, prefix, sizes) is PrefillForm.ABSORBED
            for new in (*range(128, 2050, 128), 4096, 8192, 16384)
        ]
        assert forms == sorted(forms, reverse=True), prefix
        assert not forms[-1]
        if prefix >= 524288:
            assert chosen(8, prefix, sizes) is PrefillForm.ABSORBED


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_times_grow_with_every_length(sizes: MlaSizes) -> None:
    news = [1, 7, 64, 65, 700, 1024, 5000]
    prefixes = [1, 100, 8192, CAPACITY - 5000, CAPACITY, CAPACITY + 1, 1 << 20]
    for seconds in (in_place, gathered):
        for prefix in prefixes:
            times = [seconds(new, prefix, sizes) for new in news]
            assert times == sorted(times)
        for new in news:
            times = [seconds(new, prefix, sizes) for prefix in prefixes]
            assert times == sorted(times)


def test_a_faster_link_never_makes_a_prefix_stay() -> None:
    fast = HOPPER._replace(gather_bytes=1e15)
    for new, prefix in itertools.product((1, 64, 700, 900), (2048, 65536, 524288)):
        batch = batch_of([new], [prefix])
        if chosen(new, prefix) is not PrefillForm.ABSORBED:
            again = choose_prefill_form(batch, LITE, expand_prefix=True, rates=fast)
            assert again is not PrefillForm.ABSORBED


def test_other_ranks_orders_of_requests_choose_the_same() -> None:
    draw = random.Random(3)
    for _ in range(200):
        rows = [(draw.randrange(1, 900), draw.randrange(0, 200000)) for _ in range(9)]
        forms = set()
        for _ in range(3):
            draw.shuffle(rows)
            new, prefix = map(list, zip(*rows))
            batch = batch_of(new, prefix)
            forms.add(choose_prefill_form(batch, LITE, expand_prefix=True))
        assert len(forms) == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
