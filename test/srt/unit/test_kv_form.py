"""Which form a prefill over a prefix of K/V heads takes: the rule, by brute force.

Only this file sees the choice at lengths of real servers, and that all ranks make it alike.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable

import pytest

from sglang_dcp.layers.backends.fa3 import Fa3Backend
from sglang_dcp.layers.backends.fa3_splits import FULL_TILES, Fa3Heads, ragged_splits
from sglang_dcp.layers.backends.flashinfer import FlashInferBackend
from sglang_dcp.layers.backends.triton import TritonBackend
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.kv_form import (
    MOST_GATHERED_BYTES,
    KvForm,
    KvSizes,
    choose_kv_form,
    gathered_seconds,
    in_place_seconds,
)
from sglang_dcp.layers.prefix.rates import HOPPER

CHUNK = 8192
LAYERS = 48
# Of Qwen3-30B-A3B: all of it at tp 2, and a quarter of it, which was measured. Their kernel
# does not split gathered keys, as that of `flashinfer`.
QWEN3 = KvSizes(16, 4, 2, 128, 128)
QUARTER = KvSizes(4, 1, 2, 128, 128)
SIZES = [
    KvSizes(heads, kv_heads, dcp, dim, dim)
    for heads, kv_heads, dcp, dim in itertools.product(
        (4, 8, 16), (1, 2, 4), (2, 4, 8), (64, 128)
    )
]
ODD = [KvSizes(6, 3, 2, 128, 128), KvSizes(2, 2, 3, 128, 128), KvSizes(3, 3, 4, 64, 64)]


def on_fa3(sizes: KvSizes) -> KvSizes:
    return sizes._replace(split_below=Fa3Backend.splits_ragged_below)


def gathers(new: int, prefix: int, sizes: KvSizes = QWEN3) -> bool:
    return choose_kv_form(Requests([new], [prefix]), sizes) is KvForm.GATHERED


def plain_seconds(requests: Requests) -> float:
    """A layer of the measured model in plain TP: no exchange and no further launches."""
    free = HOPPER._replace(
        gather_bytes=math.inf,
        exchange_bytes=math.inf,
        memory_bytes=math.inf,
        kv_in_place_host_s=0,
    )
    return in_place_seconds(requests, QUARTER._replace(dcp_size=1), free)


def more_than_plain(seconds: Callable[..., float], requests: Requests) -> float:
    """Seconds that all layers of the measured model take more than in plain TP."""
    one = seconds(requests, on_fa3(QUARTER), HOPPER) - plain_seconds(requests)
    return LAYERS * one


# Chunks over a prefix of a prompt of 32,768 tokens.
CHUNKS = [Requests([CHUNK], [prefix]) for prefix in range(CHUNK, 4 * CHUNK, CHUNK)]


@pytest.mark.parametrize("sizes", [QWEN3, QUARTER], ids=["whole", "quarter"])
def test_whole_chunks_of_prompts_of_32k_are_gathered(sizes: KvSizes) -> None:
    for prefix in range(CHUNK, 32768, CHUNK):
        assert gathers(CHUNK, prefix, sizes), prefix


def test_the_measured_turn_costs_in_place_what_was_measured() -> None:
    """100 tokens on 30,720 positions: 54 ms more. The GPU hides no launch."""
    turn = Requests([100], [30720])
    more = more_than_plain(in_place_seconds, turn)
    assert more == pytest.approx(54e-3, rel=0.05)
    # Not measured: the launches of this form are scaled.
    assert 0.2 * more < more_than_plain(gathered_seconds, turn) < 0.35 * more


def test_the_measured_chunks_cost_in_place_what_was_measured() -> None:
    """The three took 40 ms more. Another measurement told 23 ms for one chunk."""
    more = [more_than_plain(in_place_seconds, chunk) for chunk in CHUNKS]
    assert sum(more) == pytest.approx(40e-3, rel=0.15)
    assert max(more) == pytest.approx(23e-3, rel=0.15)


def test_the_measured_chunks_hide_the_launches_of_a_gather() -> None:
    """They took 8.5 ms more, of which half are the bytes that the estimate counts."""
    more = [more_than_plain(gathered_seconds, chunk) for chunk in CHUNKS]
    assert sum(more) == pytest.approx(8.5e-3 / 2, rel=0.15)
    free = HOPPER._replace(kv_gather_host_s=0)
    for chunk in CHUNKS:
        sizes = on_fa3(QUARTER)
        assert gathered_seconds(chunk, sizes, HOPPER) == (
            gathered_seconds(chunk, sizes, free)
        )


@pytest.mark.parametrize("new", [1, 64, 100, 256])
def test_short_turns_are_gathered_where_keys_are_split(new: int) -> None:
    """Up to the bound on gathered bytes."""
    for prefix in (30720, 65536, 131072, 250_000):
        assert gathers(new, prefix, on_fa3(QUARTER)), prefix
    assert not gathers(new, 262_145, on_fa3(QUARTER))


@pytest.mark.parametrize("new", [1, 64, 100, 256])
def test_without_splits_short_turns_on_long_prefixes_stay_in_place(new: int) -> None:
    """One tile of rows goes through all keys, longer than the launches in place take."""
    assert gathers(new, 30720, QUARTER) and gathers(new, 65536, QUARTER)
    for prefix in (163840, 250_000):
        assert not gathers(new, prefix, QUARTER), prefix


def test_keys_that_are_not_split_count_beside_a_long_chunk() -> None:
    """A chunk of 8192 tokens leaves no SM idle, so FA3 splits no keys of that batch."""
    mixed = Requests([CHUNK, 1], [1024, 100_000])
    sizes = on_fa3(QUARTER)
    assert gathered_seconds(mixed, sizes, HOPPER) == (
        gathered_seconds(mixed, QUARTER, HOPPER)
    )
    turns = Requests([64, 1], [1024, 100_000])
    assert gathered_seconds(turns, sizes, HOPPER) < (
        gathered_seconds(turns, QUARTER, HOPPER)
    )


def test_the_estimate_counts_splits_where_fa3_is_asked_for_them() -> None:
    heads = Fa3Heads(4, 1, 128, 128)
    for tokens in range(1, 5000, 31):
        splits = ragged_splits(heads, tokens, tokens, 1 << 17)
        requests = Requests([tokens], [1 << 17])
        longer = [
            gathered_seconds(requests, sizes, HOPPER._replace(tile_flops=1e9))
            for sizes in (QUARTER, on_fa3(QUARTER))
        ]
        assert (splits > 1) == (longer[1] < longer[0]), tokens


def test_backends_say_whether_they_split_gathered_keys() -> None:
    assert Fa3Backend.splits_ragged_below == FULL_TILES
    for backend in (FlashInferBackend, TritonBackend):
        assert backend.splits_ragged_below == 0


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_without_a_prefix_nothing_is_gathered(sizes: KvSizes) -> None:
    assert choose_kv_form(Requests([CHUNK, 1], [0, 0]), sizes) is KvForm.IN_PLACE


def test_prefixes_of_decoded_tokens_in_a_mixed_chunk_count() -> None:
    """Each row of a mixed chunk has a prefix of its own, and one token."""
    new, prefix = [CHUNK], [8192]
    assert choose_kv_form(Requests(new, prefix), QWEN3) is KvForm.GATHERED
    rows = 64
    mixed = Requests([*new, *[1] * rows], [*prefix, *[32768] * rows])
    assert choose_kv_form(mixed, QWEN3) is KvForm.IN_PLACE


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_gathered_bytes_are_bounded(sizes: KvSizes) -> None:
    """At the bound no number of new tokens helps. One position less may be gathered."""
    most = sizes.most_positions
    heads = max(sizes.window, sizes.kept)
    assert most * heads * 2 * sizes.qk * 2 <= MOST_GATHERED_BYTES
    assert not gathers(1 << 30, most + 1, sizes)
    assert gathers(1 << 24, most, sizes)


@pytest.mark.parametrize("sizes", SIZES + ODD, ids=str)
def test_short_turns_and_long_chunks_are_gathered_and_nothing_else(
    sizes: KvSizes,
) -> None:
    """By launches at first, in the end by bytes. Lengths between them stay in place."""
    for prefix in (1, 100, 8192, 32768, 100_000):
        if prefix > sizes.most_positions:
            continue
        forms = [
            gathers(new, prefix, on_fa3(sizes))
            for new in (*range(128, 2050, 128), *range(3072, 32768, 1024), 1 << 24)
        ]
        assert forms[0] and forms[-1], prefix
        assert sum(a and not b for a, b in itertools.pairwise(forms)) <= 1, prefix


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


def test_other_orders_of_requests_choose_the_same() -> None:
    draw = random.Random(3)
    for _ in range(200):
        rows = [(draw.randrange(1, 900), draw.randrange(0, 9000)) for _ in range(9)]
        forms = set()
        for _ in range(3):
            draw.shuffle(rows)
            new, prefix = map(list, zip(*rows))
            forms.add(choose_kv_form(Requests(new, prefix), QWEN3))
        assert len(forms) == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
