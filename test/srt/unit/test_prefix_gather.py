"""Which rows of which rank make up a chunk of the requests' prefixes, by brute force.

Only this file sees each row of the plan. In its cases a rank holds nothing of a chunk, or
fewer rows than others. A chunk begins amid a turn of the owners, or a request has no
position in it.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.attention_oracle import Served
from sglang_dcp.layers.local_batch import Shard
from sglang_dcp.layers.mla.latents import gather_latents
from sglang_dcp.layers.prefix.gather import plan_gather, split_into_chunks

DIM, LATENT = 4, 3
# Start and length of the chunk, by request.
Chunk = list[tuple[int, int]]


def served(chunk: Chunk, dcp_size: int, page_size: int) -> Served:
    """Requests a, b, ..., stored up to the end of the chunk and a little further."""
    batch = Served(page_size, dcp_size)
    for number, (name, (start, length)) in enumerate(zip("abcdef", chunk)):
        batch.grow(name, start + length + number % 3)
    return batch


def pool_of(batch: Served, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Each slot holds its request and position; NaN where nothing is stored."""
    pool = torch.full((400 * batch.page_size, 1, DIM), float("nan"))
    for number, name in enumerate(batch.rows):
        for position, slot in batch.local_slots(name, rank).items():
            pool[slot] = torch.tensor([number, position // 16, position % 16, 1.0])
    return pool.to(dtype)


def shard_of(batch: Served, rank: int) -> Shard:
    # A prefill's local table ends before its new tokens: nothing may come from it.
    return Shard(batch.table, torch.empty(0), batch.dcp_size, rank, batch.page_size)


def gathered(
    chunk: Chunk, dcp: int, page: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What each rank ends with."""
    batch = served(chunk, dcp, page)
    rows = torch.tensor([batch.rows[name] for name, _ in zip("abcdef", chunk)])
    # SGLang's are int32.
    starts, lens = torch.tensor(chunk, dtype=torch.int32).unbind(1)
    plans = [plan_gather(shard_of(batch, r), rows, starts, lens) for r in range(dcp)]
    pools = [pool_of(batch, rank, dtype) for rank in range(dcp)]
    sent = [pool[plan.slots].flatten(1) for plan, pool in zip(plans, pools)]
    assert len({len(own) for own in sent}) == 1, "ranks send different sizes"
    asked: list[torch.Tensor] = []

    def gather_rows(own: torch.Tensor) -> torch.Tensor:
        asked.append(own.view(dtype))
        return torch.cat(sent).view(own.dtype)

    exchange: Any = SimpleNamespace(gather_rows=gather_rows)
    parts = [gather_latents(*both, LATENT, exchange) for both in zip(plans, pools)]
    for latent, rope in parts:
        # Kernels of quantized weights ask for it.
        assert latent.is_contiguous() and rope.is_contiguous()
        assert latent.shape[1] == LATENT
    found = [torch.cat(own, dim=1) for own in parts]
    for own, rows in zip(asked, sent):
        assert torch.equal(own.float().nan_to_num(-1), rows.float().nan_to_num(-1))
    return found


def wanted(chunk: Chunk) -> torch.Tensor:
    rows = [
        [number, p // 16, p % 16, 1]
        for number, (start, length) in enumerate(chunk)
        for p in range(start, start + length)
    ]
    return torch.tensor(rows, dtype=torch.float32).view(-1, DIM)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("dcp", [2, 3, 4, 8])
def test_each_request_has_its_positions_in_order(dcp: int, page: int) -> None:
    draw = random.Random(dcp * 10 + page)
    cases: list[Chunk] = [
        [(0, 5), (0, 1), (0, 0), (0, 30)],
        [(0, 1)],
        [(3, 0), (3, 2)],
        [(7, 1)],
    ]
    for _ in range(20):
        chunk = [
            (draw.choice([0, draw.randint(1, 20)]), draw.choice([0, 1, 9, 23]))
            for _ in range(draw.randint(1, 5))
        ]
        chunk[draw.randrange(len(chunk))] = draw.randint(0, 20), draw.randint(1, 20)
        cases.append(chunk)
    for chunk in cases:
        for got in gathered(chunk, dcp, page, torch.float32):
            assert torch.equal(got, wanted(chunk)), chunk


@pytest.mark.parametrize("dcp", [2, 3, 4])
def test_own_rows_first_are_the_same_rows(dcp: int) -> None:
    """An exchange between peers leaves a rank's own rows where they are."""
    chunk = [(0, 9), (0, 0), (5, 1), (2, 7)]
    batch = served(chunk, dcp, 4)
    rows = torch.tensor([batch.rows[name] for name, _ in zip("abcdef", chunk)])
    starts, lens = torch.tensor(chunk).unbind(1)
    plans = [
        plan_gather(shard_of(batch, rank), rows, starts, lens, own_first=True)
        for rank in range(dcp)
    ]
    sent = [
        pool_of(batch, rank, torch.float32)[plan.slots].flatten(1)
        for rank, plan in enumerate(plans)
    ]
    for rank, plan in enumerate(plans):
        order = [rank, *(peer for peer in range(dcp) if peer != rank)]
        every = torch.cat([sent[peer] for peer in order])
        assert torch.equal(every[plan.order], wanted(chunk))


def test_fp8_latents_stay_as_they_are() -> None:
    chunk = [(0, 15), (2, 3)]
    for got in gathered(chunk, 2, 1, torch.float8_e4m3fn):
        assert got.dtype == torch.float8_e4m3fn
        assert torch.equal(got.float(), wanted(chunk))


def test_pieces_are_few_and_hold_each_position_once() -> None:
    draw = random.Random(3)
    cases = [([10, 3], 8), ([1], 1), ([0, 0, 5], 2), ([4, 4], 4), ([7, 0, 1], 100)]
    for _ in range(50):
        prefix = [draw.choice([0, draw.randint(1, 60)]) for _ in range(5)]
        prefix[draw.randrange(5)] = draw.randint(1, 60)
        cases.append((prefix, draw.randint(1, 80)))
    for prefix, most in cases:
        starts, lens = split_into_chunks(prefix, most)
        assert starts.dtype == lens.dtype == torch.int32
        assert len(lens) == -(-sum(prefix) // most)
        assert lens.sum(1).tolist()[:-1] == [most] * (len(lens) - 1)
        for request, length in enumerate(prefix):
            found = [
                position
                for start, held in zip(starts[:, request], lens[:, request])
                for position in range(int(start), int(start + held))
            ]
            assert found == list(range(length)), (prefix, most)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
