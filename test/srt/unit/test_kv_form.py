"""Whether a prefill gathers the K/V heads of its prefix: the rule, by brute force.

Only this file sees the choice at lengths of real servers, and that all ranks make it alike.
"""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.kv_form import (
    MOST_GATHERED_BYTES,
    KvSizes,
    gathered_seconds,
    gathers_prefix,
    in_place_seconds,
    rows_seconds,
    takes_rows,
)
from sglang_dcp.layers.prefix.rates import HOPPER

CHUNK = 8192
# Of Qwen3-30B-A3B: all of it at tp 2, and a quarter of it, which was measured.
QWEN3 = KvSizes(16, 4, 2, 128, 128)
QUARTER = KvSizes(4, 1, 2, 128, 128)
SIZES = [
    KvSizes(heads, kv_heads, dcp, dim, dim)
    for heads, kv_heads, dcp, dim in itertools.product(
        (4, 8, 16), (1, 2, 4), (2, 4, 8), (64, 128)
    )
]
ODD = [KvSizes(6, 3, 2, 128, 128), KvSizes(2, 2, 3, 128, 128), KvSizes(3, 3, 4, 64, 64)]


def gathers(new: int, prefix: int, sizes: KvSizes = QWEN3) -> bool:
    return gathers_prefix(Requests([new], [prefix]), sizes)


@pytest.mark.parametrize("sizes", [QWEN3, QUARTER], ids=["whole", "quarter"])
def test_whole_chunks_of_prompts_of_32k_are_gathered(sizes: KvSizes) -> None:
    for prefix in range(CHUNK, 32768, CHUNK):
        assert gathers(CHUNK, prefix, sizes), prefix


def test_the_measured_chunk_costs_in_place_what_was_measured() -> None:
    """23 ms more than plain TP over 48 layers; attention is as long as there."""
    chunks = [Requests([CHUNK], [at]) for at in (0, 8192, 16384, 24576)]
    plain = QUARTER._replace(dcp_size=1, local_heads=4)
    extra = [
        in_place_seconds(chunk, QUARTER, HOPPER)
        - (in_place_seconds(chunk, plain, HOPPER) - HOPPER.kv_in_place_host_s)
        for chunk in chunks
    ]
    assert 48 * extra[-1] == pytest.approx(23e-3, rel=0.15)


def test_the_measured_chunks_cost_gathered_what_was_measured() -> None:
    """8.5 ms more than plain TP for three chunks over a prefix; attention is as long."""
    free = HOPPER._replace(
        gather_bytes=math.inf, memory_bytes=math.inf, kv_gather_host_s=0.0
    )
    extra = 0.0
    for prefix in (8192, 16384, 24576):
        chunk = Requests([CHUNK], [prefix])
        extra += gathered_seconds(chunk, QUARTER, HOPPER)
        extra -= gathered_seconds(chunk, QUARTER, free)
    assert 48 * extra == pytest.approx(8.5e-3, rel=0.15)


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_short_turns_on_long_prefixes_stay_in_place(sizes: KvSizes) -> None:
    for new, prefix in itertools.product((1, 64), (65536, 131072, 1 << 20)):
        assert not gathers(new, prefix, sizes), (new, prefix)


@pytest.mark.parametrize("new", [1, 64])
def test_the_measured_turns_stay_in_place(new: int) -> None:
    assert not gathers(new, 32768, QUARTER)


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_without_a_prefix_nothing_is_gathered(sizes: KvSizes) -> None:
    assert not gathers_prefix(Requests([CHUNK, 1], [0, 0]), sizes)


def test_prefixes_of_decoded_tokens_in_a_mixed_chunk_count() -> None:
    """Each row of a mixed chunk has a prefix of its own, and one token."""
    new, prefix = [CHUNK], [8192]
    assert gathers_prefix(Requests(new, prefix), QWEN3)
    rows = 64
    mixed = Requests([*new, *[1] * rows], [*prefix, *[32768] * rows])
    assert not gathers_prefix(mixed, QWEN3)


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_gathered_bytes_are_bounded(sizes: KvSizes) -> None:
    """At the bound no number of new tokens helps. One position less may be gathered."""
    most = sizes.most_positions
    heads = max(sizes.window, sizes.kept)
    assert most * heads * 2 * sizes.qk * 2 <= MOST_GATHERED_BYTES
    assert not gathers(1 << 30, most + 1, sizes)
    assert gathers(1 << 24, most, sizes)


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_once_a_length_gathers_all_longer_ones_do(sizes: KvSizes) -> None:
    for prefix in (1, 100, 8192, 32768):
        forms = [
            gathers(new, prefix, sizes)
            for new in (*range(128, 2050, 128), 4096, 8192, 16384)
        ]
        assert forms == sorted(forms), prefix


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_times_grow_with_every_length(sizes: KvSizes) -> None:
    news, prefixes = [1, 64, 700, 5000], [1, 100, 8192, 131072, 1 << 20]
    for seconds in (in_place_seconds, gathered_seconds):
        for prefix in prefixes:
            told = [seconds(Requests([n], [prefix]), sizes, HOPPER) for n in news]
            assert told == sorted(told)
        for new in news:
            told = [seconds(Requests([new], [p]), sizes, HOPPER) for p in prefixes]
            assert told == sorted(told)


def rows(new: int, prefix: int, sizes: KvSizes = QUARTER) -> bool:
    return takes_rows(Requests([new], [prefix]), sizes._replace(most_rows=256))


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_few_new_tokens_become_decode_rows(sizes: KvSizes) -> None:
    """Where they read less than what the host would need for another form."""
    assert rows(1, 32768, sizes) and rows(8, 8192, sizes)
    assert not rows(256, 1 << 20, sizes)
    for prefix in (8192, 32768, 131072, 1 << 20):
        taken = [rows(new, prefix, sizes) for new in range(1, 257, 5)]
        assert taken == sorted(taken, reverse=True), prefix


def test_decode_rows_need_a_prefix_and_room() -> None:
    sizes = QUARTER._replace(most_rows=8)
    assert takes_rows(Requests([7, 1], [0, 1000]), sizes)
    assert not takes_rows(Requests([7, 2], [0, 1000]), sizes)
    assert not takes_rows(Requests([7, 1], [0, 0]), sizes)
    assert not takes_rows(Requests([7, 1], [0, 1000]), QUARTER)


def test_each_row_reads_its_prefix() -> None:
    one, four = (
        rows_seconds(Requests([new], [1 << 20]), QUARTER, HOPPER) for new in (1, 4)
    )
    assert four == pytest.approx(4 * one, rel=0.01)


def test_other_orders_of_requests_choose_the_same() -> None:
    draw = random.Random(3)
    for _ in range(200):
        rows = [(draw.randrange(1, 900), draw.randrange(0, 9000)) for _ in range(9)]
        forms = set()
        for _ in range(3):
            draw.shuffle(rows)
            new, prefix = map(list, zip(*rows))
            forms.add(gathers_prefix(Requests(new, prefix), QWEN3))
        assert len(forms) == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
