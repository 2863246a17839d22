"""Rank and head arithmetic by brute force over every grid up to 64 ranks.

Only this file sees sizes that no machine here can start, and the order of the head
slices that ``o_proj`` receives.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from itertools import permutations
from typing import Iterator, List, Sequence, Tuple

import pytest

from sglang_dcp.config import Replicas, resolve_config
from sglang_dcp.distributed.groups import _pools
from sglang_dcp.distributed.topology import Layout, divisors
from sglang_dcp.ops.layout import kv_heads_of_local_q

LAYOUTS = [
    Layout(tp_size, attn_tp_size)
    for tp_size in range(1, 65)
    for attn_tp_size in range(1, tp_size + 1)
    if tp_size % attn_tp_size == 0
]
KV_HEADS = (1, 2, 3, 4, 5, 6, 8, 10, 16, 24, 128)


def pools(layout: Layout, count: int, first: int = 0) -> List[List[int]]:
    starts = range(first, first + count * layout.tp_size, layout.tp_size)
    return [list(range(start, start + layout.tp_size)) for start in starts]


def models(layout: Layout) -> Iterator[Tuple[int, int]]:
    """Every (q_heads, kv_heads) of a small table that the layout can cut."""
    for kv_heads in KV_HEADS:
        if kv_heads % layout.attn_tp_size and layout.attn_tp_size % kv_heads:
            continue
        least = layout.tp_size // math.gcd(layout.tp_size, kv_heads)
        for multiple in (1, 2, 3, 5):
            yield kv_heads * least * multiple, kv_heads


def own_q_heads(layout: Layout, q_heads: int, tp_rank: int) -> List[int]:
    width = q_heads // layout.tp_size
    return list(range(tp_rank * width, (tp_rank + 1) * width))


@pytest.mark.parametrize("count", [1, 3], ids=["one-pool", "three-pools"])
def test_groups_partition_the_ranks(count: int) -> None:
    for layout in LAYOUTS:
        tp_groups = pools(layout, count)
        everyone = [rank for ranks in tp_groups for rank in ranks]
        dcp_size = layout.dcp_groups(tp_groups)
        attn_tp = layout.attn_tp_groups(tp_groups)
        assert sorted(rank for ranks in dcp_size for rank in ranks) == everyone
        assert sorted(rank for ranks in attn_tp for rank in ranks) == everyone
        assert {len(ranks) for ranks in dcp_size} == {layout.dcp_size}
        assert {len(ranks) for ranks in attn_tp} == {layout.attn_tp_size}
        for ranks in dcp_size + attn_tp:
            assert len({rank // layout.tp_size for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("nodes", "per_node"), [(1, 4), (2, 2), (4, 1), (2, 3), (3, 2), (1, 6), (6, 1)]
)
def test_groups_lie_inside_nodes_if_any_rank_order_allows_it(
    nodes: int, per_node: int
) -> None:
    """DCP groups are runs of ranks, and so are nodes: no other order is better."""
    ranks = range(nodes * per_node)

    def inside(layout: Layout, order: Sequence[int]) -> bool:
        groups = layout.dcp_groups([order])
        return all(len({rank // per_node for rank in group}) == 1 for group in groups)

    for layout in (found for found in LAYOUTS if found.tp_size == len(ranks)):
        possible = any(inside(layout, order) for order in permutations(ranks))
        assert layout.groups_inside_nodes(per_node) == inside(layout, ranks) == possible


def test_position_in_a_group_is_the_rank_in_it() -> None:
    for layout in LAYOUTS:
        tp_groups = pools(layout, 2)
        for ranks in layout.dcp_groups(tp_groups):
            tp_ranks = [rank % layout.tp_size for rank in ranks]
            first = tp_ranks[0] // layout.dcp_size * layout.dcp_size
            assert tp_ranks == list(range(first, first + layout.dcp_size))
            assert [layout.dcp_rank(r) for r in tp_ranks] == list(range(len(ranks)))
            assert len({layout.attn_tp_rank(r) for r in tp_ranks}) == 1
        for ranks in layout.attn_tp_groups(tp_groups):
            tp_ranks = [rank % layout.tp_size for rank in ranks]
            assert [layout.attn_tp_rank(r) for r in tp_ranks] == list(range(len(ranks)))
            assert len({layout.dcp_rank(r) for r in tp_ranks}) == 1


def test_replicas_of_dp_attention_keep_their_groups_apart() -> None:
    """By SGLang's rule: rank r of --tp-size is rank r % width of replica r // width."""
    cases = 0
    for tp_size in range(1, 17):
        for count in divisors(tp_size):
            width = tp_size // count
            for dcp_size in divisors(width)[1:]:
                config = resolve_config(
                    tp_size=tp_size,
                    dcp_size=dcp_size,
                    attn_tp_size=None,
                    replicas=Replicas(count),
                )
                assert config is not None
                layout = config.layout
                assert layout == Layout(width, width // dcp_size, count)
                for stages in (1, 2):
                    _check_groups_of_replicas(layout, stages * tp_size)
                    cases += 1
    assert cases > 100


def _check_groups_of_replicas(layout: Layout, world_size: int) -> None:
    width = layout.tp_size
    replicas = _pools(world_size, width)
    for groups, rank_in, size in (
        (layout.dcp_groups(replicas), layout.dcp_rank, layout.dcp_size),
        (layout.attn_tp_groups(replicas), layout.attn_tp_rank, layout.attn_tp_size),
    ):
        assert sorted(sum(groups, [])) == list(range(world_size))
        for ranks in groups:
            assert len({rank // width for rank in ranks}) == 1
            assert [rank_in(rank % width) for rank in ranks] == list(range(size))


def test_groups_follow_the_given_global_ranks() -> None:
    layout = Layout(tp_size=4, attn_tp_size=2)
    shifted = pools(layout, 2, first=8)
    assert layout.dcp_groups(shifted) == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert layout.attn_tp_groups(shifted) == [[8, 10], [9, 11], [12, 14], [13, 15]]


def test_exchange_leaves_the_plain_tp_head_slice() -> None:
    for layout in LAYOUTS:
        q_heads = 3 * layout.tp_size
        shard_width = q_heads // layout.attn_tp_size
        for tp_rank in range(layout.tp_size):
            start = layout.attn_tp_rank(tp_rank) * shard_width
            shard = list(range(start, start + shard_width))
            chunk = shard_width // layout.dcp_size
            kept = shard[layout.dcp_rank(tp_rank) * chunk :][:chunk]
            assert kept == own_q_heads(layout, q_heads, tp_rank)


def test_kv_shard_is_what_the_qkv_layer_loads() -> None:
    """SGLang's rule at width tp_size, its replica count taken dcp_size-fold."""
    for layout in LAYOUTS:
        for _, kv_heads in models(layout):
            width = max(1, kv_heads // layout.attn_tp_size)
            replicas = max(1, layout.attn_tp_size // kv_heads) * layout.dcp_size
            assert layout.kv_heads_per_rank(kv_heads) == width
            for tp_rank in range(layout.tp_size):
                first = tp_rank // replicas * width
                assert layout.kv_shard(kv_heads, tp_rank) == range(first, first + width)


def test_kv_heads_of_local_q_are_those_of_the_own_q_heads() -> None:
    cases = 0
    for layout in LAYOUTS:
        for q_heads, kv_heads in models(layout):
            for tp_rank in range(layout.tp_size):
                held = layout.kv_shard(kv_heads, tp_rank)
                own = own_q_heads(layout, q_heads, tp_rank)
                local = kv_heads_of_local_q(
                    len(own), len(held), layout.dcp_size, layout.dcp_rank(tp_rank)
                )
                used = [head // (q_heads // kv_heads) for head in own]
                assert [held[head] for head in local] == used
                cases += 1
    assert cases > 10_000


@pytest.mark.parametrize(
    ("tp_size", "attn_tp_size", "message"),
    [
        pytest.param(0, 1, "--tp-size is 0", id="tp0"),
        pytest.param(4, 0, "--attn-tp-size is 0", id="attn0"),
        pytest.param(4, -2, "--attn-tp-size is -2", id="attn-negative"),
        pytest.param(
            6,
            4,
            r"--attn-tp-size 4 does not divide --tp-size 6.*"
            r"--attn-tp-size 1, 2, 3, 6 \(--dcp-size 6, 3, 2, 1\)",
            id="not-a-divisor",
        ),
        pytest.param(2, 4, "--attn-tp-size 4 does not divide", id="wider-than-tp"),
    ],
)
def test_bad_layouts_say_what_to_do(
    tp_size: int, attn_tp_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(tp_size, attn_tp_size)


@pytest.mark.parametrize(
    ("layout", "q_heads", "kv_heads", "message"),
    [
        pytest.param(
            Layout(8, 2),
            12,
            2,
            r"--tp-size 8 does not divide.* 12 query heads. Use --tp-size 2 \(--dcp-size 2\)",
            id="q-heads",
        ),
        pytest.param(
            Layout(8, 4),
            40,
            10,
            r"--attn-tp-size 4 \(--dcp-size 2\).*10 KV heads.*"
            r"Use --tp-size 8 \(--dcp-size 4, 8\)",
            id="kv-heads",
        ),
        pytest.param(
            Layout(4, 2, replicas=2),
            6,
            2,
            r"--tp-size 8 / 2 replicas, 4 ranks each, does not divide.* 6 query heads. "
            r"Use --tp-size 4 \(--dcp-size 2\) or --tp-size 6 \(--dcp-size 3\) or "
            r"--tp-size 12 \(--dcp-size 3, 6\)",
            id="q-heads-of-replicas",
        ),
        pytest.param(Layout(2, 1), 6, 4, "6 query heads and 4 KV heads", id="ragged"),
        pytest.param(Layout(2, 1), 2, 0, "2 query heads and 0 KV heads", id="no-kv"),
    ],
)
def test_bad_heads_say_what_to_do(
    layout: Layout, q_heads: int, kv_heads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check_heads(q_heads, kv_heads)


@pytest.mark.parametrize(
    ("layout", "q_heads", "kv_heads", "wanted"),
    [
        pytest.param(Layout(24, 8), 72, 6, {24: [2, 4, 8, 12, 24]}, id="kv-heads"),
        pytest.param(
            Layout(3, 1), 8, 2, {2: [2], 4: [2, 4], 8: [2, 4, 8]}, id="q-heads"
        ),
    ],
)
def test_suggested_layouts_work(
    layout: Layout, q_heads: int, kv_heads: int, wanted: dict[int, list[int]]
) -> None:
    """Nothing that would be refused next, and nothing left out."""
    with pytest.raises(ValueError) as caught:
        layout.check_heads(q_heads, kv_heads)
    hint = str(caught.value).split("Use ")[1]
    listed = re.findall(r"--tp-size (\d+) \(--dcp-size ([\d, ]+)\)", hint)
    found = {int(tp): [int(size) for size in sizes.split(", ")] for tp, sizes in listed}
    assert found == wanted
    for tp_size, dcp_sizes in found.items():
        for dcp_size in dcp_sizes:
            Layout(tp_size, tp_size // dcp_size).check_heads(q_heads, kv_heads)


def test_heads_that_no_layout_serves() -> None:
    with pytest.raises(ValueError, match="Use it without --dcp-size"):
        Layout(2, 1).check_heads(71, 1)


def test_global_ranks_and_short_groups_are_refused() -> None:
    layout = Layout(4, 2)
    for tp_rank in (-1, 4):
        with pytest.raises(ValueError, match="outside --tp-size 4"):
            layout.dcp_rank(tp_rank)
        with pytest.raises(ValueError, match="outside --tp-size 4"):
            layout.attn_tp_rank(tp_rank)
    with pytest.raises(ValueError, match="has 3 ranks, --tp-size is 4"):
        layout.dcp_groups([[0, 1, 2]])
    with pytest.raises(ValueError, match="has 3 ranks, --tp-size is 4"):
        layout.attn_tp_groups([[0, 1, 2]])
    with pytest.raises(ValueError, match="10 KV heads.*--attn-tp-size 4"):
        Layout(8, 4).kv_heads_per_rank(10)


def test_layout_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout(4, 2).tp_size = 8  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
