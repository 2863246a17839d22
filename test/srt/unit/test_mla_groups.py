"""Which requests of an MLA prefill by group keep their prefix in place, by brute force.

Only this file compares one form for all requests with a form for each, by estimated time.
"""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

from sglang_dcp.layers.backends.fa3_splits import FULL_TILES
from sglang_dcp.layers.mla import cost, groups
from sglang_dcp.layers.mla.cost import MlaSizes, Requests
from sglang_dcp.layers.mla.form import (
    MOST_PREFIX_CHUNKS,
    PrefillBatch,
    PrefillForm,
    choose_prefill_form,
    expanded_form,
    expanded_seconds,
)
from sglang_dcp.layers.mla.groups import (
    MOST_IN_PLACE_TOKENS,
    best_groups,
    requests_in_place,
)
from sglang_dcp.layers.prefix.rates import HOPPER

CAPACITY = 1 << 17
MOST = MOST_PREFIX_CHUNKS * CAPACITY
LITE = MlaSizes(8, 2, 512, 64, 128, 128, split_below=FULL_TILES)
V3 = MlaSizes(16, 8, 512, 64, 128, 128, split_below=FULL_TILES)
CHUNK, SHORT = 8192, 100
K = 1024


def chosen(
    new: list[int], prefix: list[int], sizes: MlaSizes = LITE, by_group: bool = True
) -> PrefillForm:
    batch = PrefillBatch(Requests(new, prefix), CAPACITY)
    return choose_prefill_form(batch, sizes, expand_prefix=True, by_group=by_group)


def seconds(
    requests: Requests, sizes: MlaSizes = LITE, most: int = MOST
) -> float | None:
    found = best_groups(requests, most, CAPACITY, sizes, HOPPER)
    return found and found.seconds


def one_for_all(requests: Requests, sizes: MlaSizes) -> float:
    batch = PrefillBatch(requests, CAPACITY)
    form = expanded_form(batch)
    return min(
        cost.in_place_seconds(requests, sizes, HOPPER),
        expanded_seconds(batch, form, sizes, HOPPER),
    )


@pytest.mark.parametrize("sizes", [LITE, V3], ids=["lite", "v3"])
@pytest.mark.parametrize("long", [0, 32 * K, 256 * K])
@pytest.mark.parametrize("short", [128 * K, 512 * K])
def test_short_turns_stay_and_a_long_chunk_is_gathered(
    short: int, long: int, sizes: MlaSizes
) -> None:
    requests = Requests([CHUNK, *[SHORT] * 8], [long, *[short] * 8])
    assert requests_in_place(requests, sizes, HOPPER) == [False, *[True] * 8]
    batch = [CHUNK, *[SHORT] * 8], [long, *[short] * 8]
    assert chosen(*batch, sizes) is PrefillForm.BY_GROUP
    assert chosen(*batch, sizes, False) is not PrefillForm.BY_GROUP


def test_nothing_to_share_out_takes_one_form() -> None:
    for new, prefix in (
        ([CHUNK], [256 * K]),
        ([CHUNK, CHUNK], [256 * K, 32 * K]),
        ([64], [256 * K]),
        ([64] * 8, [256 * K] * 8),
        ([64] * 8, [1 * K] * 8),
        ([CHUNK, 64], [0, 0]),
        # One turn saves less than the launches of two forms take.
        ([CHUNK, SHORT], [32 * K, 32 * K]),
    ):
        assert chosen(new, prefix) is chosen(new, prefix, by_group=False), (new, prefix)


def test_all_stay_where_that_saves_the_launches_of_a_gather() -> None:
    """Though a request on a busy GPU takes less gathered."""
    requests = Requests([CHUNK, 700], [0, 32 * K])
    assert requests_in_place(requests, LITE, HOPPER) == [False, False]
    found = best_groups(requests, MOST, CAPACITY, LITE, HOPPER)
    assert found is not None and found.stays == [False, True]


def test_requests_without_a_prefix_do_not_stay() -> None:
    requests = Requests([1, 64, CHUNK], [0, 0, 0])
    assert requests_in_place(requests, LITE, HOPPER) == [False] * 3
    assert seconds(requests) is None


def test_so_many_new_tokens_stay_at_most() -> None:
    """Their exchange lives beside the new tokens' expanded keys. Short turns stay first."""
    turns = MOST_IN_PLACE_TOKENS // 64
    new, prefix = [CHUNK, 65] + [64] * turns, [0, 256 * K] + [256 * K] * turns
    for count, wanted in ((turns, [False, False]), (turns - 1, [False, False])):
        requests = Requests(new[: count + 2], prefix[: count + 2])
        groups_found = best_groups(requests, MOST, CAPACITY, LITE, HOPPER)
        assert groups_found is not None
        assert groups_found.stays == [*wanted, *[True] * count]
    requests = Requests(new[:turns], prefix[:turns])
    groups_found = best_groups(requests, MOST, CAPACITY, LITE, HOPPER)
    assert groups_found and groups_found.stays == [False, *[True] * (turns - 1)]


def test_more_than_may_be_gathered_is_not_gathered() -> None:
    requests = Requests([CHUNK, SHORT], [256 * K, 512 * K])
    assert seconds(requests, most=256 * K) is not None
    assert seconds(requests, most=256 * K - 1) is None


@pytest.mark.parametrize("sizes", [LITE, V3], ids=["lite", "v3"])
def test_each_request_goes_by_the_times_of_whole_batches(sizes: MlaSizes) -> None:
    """What a request adds is what it takes alone on a GPU without launches or idle SMs."""
    full = HOPPER._replace(tile_flops=math.inf, in_place_host_s=0.0, gather_host_s=0.0)
    turns = itertools.product((1, 63, 64, 500, 1000, CHUNK), (1, 100, 8 * K, 512 * K))
    told = set()
    for new, prefix in turns:
        alone = Requests([new], [prefix])
        in_place = cost.prefix_in_place_seconds(alone, sizes, full)
        in_place += cost.absorb_seconds([new], sizes, full)
        gathered = cost.prefix_gathered_seconds(alone, prefix, sizes, full)
        [stays] = requests_in_place(alone, sizes, HOPPER)
        assert stays == (in_place < gathered), (new, prefix)
        told.add(stays)
    assert told == {True, False}


@pytest.mark.parametrize("sizes", [LITE, V3], ids=["lite", "v3"])
def test_groups_are_nearly_the_best_of_all(sizes: MlaSizes) -> None:
    """Against every way to share out a batch. Few lose much."""
    draw = random.Random(1)
    losses = []
    for _ in range(100):
        new = [draw.choice((1, 16, 64, 100, 300, 1000)) for _ in range(5)] + [CHUNK]
        prefix = [
            draw.choice((0, 1, 8 * K, 32 * K, 128 * K, 512 * K)) for _ in range(6)
        ]
        requests = Requests(new, prefix)
        best = one_for_all(requests, sizes)
        mine = min(best, seconds(requests, sizes) or best)
        for stays in itertools.product((False, True), repeat=6):
            if any(s and not p for s, p in zip(stays, prefix)) or not any(stays):
                continue
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(groups, "requests_in_place", lambda *args: stays)
                best = min(best, seconds(requests, sizes) or best)
        losses.append(mine / best - 1)
    losses.sort()
    assert losses[75] < 0.03 and losses[90] < 0.1, losses


def test_a_form_by_group_is_chosen_only_where_it_takes_less() -> None:
    draw = random.Random(2)
    forms = set()
    for _ in range(300):
        count = draw.randrange(1, 9)
        new = [draw.choice((1, 16, 100, 1000, CHUNK)) for _ in range(count)]
        prefix = [draw.choice((0, 1 * K, 32 * K, 256 * K)) for _ in range(count)]
        requests = Requests(new, prefix)
        if not any(prefix):
            continue
        form, mine = chosen(new, prefix), seconds(requests)
        forms.add(form)
        gains = mine is not None and mine < one_for_all(requests, LITE)
        assert (form is PrefillForm.BY_GROUP) == gains
    assert PrefillForm.BY_GROUP in forms and len(forms) > 2


def test_any_order_of_requests_makes_the_same_groups() -> None:
    draw = random.Random(3)
    for _ in range(50):
        rows = [(draw.randrange(1, 900), draw.randrange(0, 400000)) for _ in range(9)]
        wanted = dict(zip(rows, requests_in_place(Requests(*zip(*rows)), LITE, HOPPER)))
        draw.shuffle(rows)
        again = requests_in_place(Requests(*zip(*rows)), LITE, HOPPER)
        assert dict(zip(rows, again)) == wanted


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
