"""Which rows of which rank make up a request's latents, by brute force.

Only this file sees each row of the plan: a prefix that a rank does not hold at all, ranks
that hold fewer rows than others, requests without a prefix among those with one.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_oracle import Served
from sglang_dcp.layers.latent_gather import Gathers, plan_latents, whole_latents
from sglang_dcp.layers.layout import refresh_local_table
from sglang_dcp.layers.local_view import Shard

DIM = 4
LATER = 100_000


def served(prefix: list[int], dcp_size: int, page_size: int) -> Served:
    """Requests a, b, ... of which `prefix` tokens each are stored."""
    batch = Served(page_size, dcp_size)
    for name, length in zip("abcdef", prefix):
        batch.grow(name, length)
    return batch


def pool_of(batch: Served, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Each slot holds its request and position; NaN where nothing is stored."""
    pool = torch.full((400 * batch.page_size, 1, DIM), float("nan"))
    for number, name in enumerate(batch.rows):
        for position, slot in batch.local_slots(name, rank).items():
            pool[slot] = torch.tensor([number, position // 16, position % 16, 1.0])
    return pool.to(dtype)


def shard_of(batch: Served, rank: int) -> Shard:
    lens = torch.tensor(list(batch.lens.values()))
    rows = torch.tensor([batch.rows[name] for name in batch.lens])
    local = torch.zeros(len(batch.table), 40, dtype=torch.int32)
    refresh_local_table(local, batch.table, rows, lens, batch.dcp_size, rank)
    return Shard(batch.table, local, batch.dcp_size, rank)


def forward_batch(batch: Served, prefix: list[int], new: list[int]) -> Any:
    rows = [batch.rows[name] for name, _ in zip("abcdef", prefix)]
    return SimpleNamespace(
        req_pool_indices=torch.tensor(rows),
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens_cpu=new,
    )


def gathered(
    prefix: list[int], new: list[int], dcp: int, page: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What each rank ends with; new tokens are numbered from `LATER` on."""
    batch = served(prefix, dcp, page)
    forward = forward_batch(batch, prefix, new)
    plans = [
        plan_latents(shard_of(batch, r), forward, Gathers(10**6)) for r in range(dcp)
    ]
    pools = [pool_of(batch, rank, dtype) for rank in range(dcp)]
    rows = []
    for plan, pool in zip(plans, pools):
        assert plan is not None
        rows.append(pool[plan.slots].flatten(1))
    exchange: Any = SimpleNamespace(gather_rows=lambda own: torch.cat(rows))
    fresh = torch.arange(sum(new)).float().add(LATER)[:, None, None].expand(-1, 1, DIM)
    return [
        whole_latents(plan, pool, fresh, exchange)  # type: ignore[arg-type]
        for plan, pool in zip(plans, pools)
    ]


def wanted(prefix: list[int], new: list[int]) -> torch.Tensor:
    rows: list[list[float]] = []
    fresh = 0
    for number, (old, more) in enumerate(zip(prefix, new)):
        rows += [[number, p // 16, p % 16, 1] for p in range(old)]
        rows += [[LATER + fresh + i] * DIM for i in range(more)]
        fresh += more
    return torch.tensor(rows, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("dcp", [2, 3, 4, 8])
def test_each_request_has_its_positions_in_order(dcp: int, page: int) -> None:
    draw = random.Random(dcp * 10 + page)
    cases = [([5, 1, 0, 30], [1, 2, 3, 4]), ([1], [1]), ([0, 2], [7, 1])]
    for _ in range(20):
        requests = draw.randint(1, 5)
        lens = [draw.choice([0, 1, draw.randint(2, 40)]) for _ in range(requests)]
        lens[draw.randrange(requests)] = draw.randint(1, 40)
        cases.append((lens, [draw.randint(1, 9) for _ in range(requests)]))
    for prefix, new in cases:
        for got in gathered(prefix, new, dcp, page, torch.float32):
            assert torch.equal(got, wanted(prefix, new)), (prefix, new)


def test_fp8_latents_become_the_models_dtype() -> None:
    prefix, new = [15, 3], [2, 1]
    for got in gathered(prefix, new, 2, 1, torch.float8_e4m3fn):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted(prefix, new))


def test_nothing_is_planned_without_a_prefix_or_beyond_the_limit() -> None:
    batch = served([6, 3], 2, 1)
    shard = shard_of(batch, 0)
    assert (
        plan_latents(shard, forward_batch(batch, [0, 0], [6, 3]), Gathers(10**6))
        is None
    )
    with_prefix = forward_batch(batch, [6, 3], [1, 2])
    assert plan_latents(shard, with_prefix, Gathers(12)) is not None
    assert plan_latents(shard, with_prefix, Gathers(11)) is None


def test_a_short_turn_on_a_long_prefix_is_left_in_place() -> None:
    """As many numbers either way: 16 heads of 576 + 512 a new token, 576 a position."""
    gathers = Gathers.of_model(16, latent=512, rope=64)
    moved = 100 * 16 * (576 + 512)
    fits = moved // 576
    assert gathers.allow(fits, 100) and not gathers.allow(fits + 1, 100)
    batch = served([6, 3], 2, 1)
    shard, forward = shard_of(batch, 0), forward_batch(batch, [6, 3], [1, 2])
    assert plan_latents(shard, forward, Gathers(10**6, per_token=3.0)) is not None
    assert plan_latents(shard, forward, Gathers(10**6, per_token=2.9)) is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
