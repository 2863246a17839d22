"""Which rows of which rank make up a piece of the requests' latents, by brute force.

Only this file sees each row of the plan: a piece that a rank does not hold at all, ranks
that hold fewer rows than others, pieces that begin amid a turn of the owners, requests
that have no position in it.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_oracle import Served
from sglang_dcp.layers.latent_gather import (
    cut_prefixes,
    gather_latents,
    gathering_moves_less,
    plan_latents,
)
from sglang_dcp.layers.local_view import Shard

DIM, LATENT = 4, 3
# Start and length of the piece, by request.
Piece = list[tuple[int, int]]


def served(piece: Piece, dcp_size: int, page_size: int) -> Served:
    """Requests a, b, ..., stored up to the end of the piece and a little further."""
    batch = Served(page_size, dcp_size)
    for number, (name, (start, length)) in enumerate(zip("abcdef", piece)):
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
    piece: Piece, dcp: int, page: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """What each rank ends with."""
    batch = served(piece, dcp, page)
    rows = torch.tensor([batch.rows[name] for name, _ in zip("abcdef", piece)])
    # SGLang's are int32.
    starts, lens = torch.tensor(piece, dtype=torch.int32).unbind(1)
    plans = [plan_latents(shard_of(batch, r), rows, starts, lens) for r in range(dcp)]
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


def wanted(piece: Piece) -> torch.Tensor:
    rows = [
        [number, p // 16, p % 16, 1]
        for number, (start, length) in enumerate(piece)
        for p in range(start, start + length)
    ]
    return torch.tensor(rows, dtype=torch.float32).view(-1, DIM)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("dcp", [2, 3, 4, 8])
def test_each_request_has_its_positions_in_order(dcp: int, page: int) -> None:
    draw = random.Random(dcp * 10 + page)
    cases: list[Piece] = [
        [(0, 5), (0, 1), (0, 0), (0, 30)],
        [(0, 1)],
        [(3, 0), (3, 2)],
        [(7, 1)],
    ]
    for _ in range(20):
        piece = [
            (draw.choice([0, draw.randint(1, 20)]), draw.choice([0, 1, 9, 23]))
            for _ in range(draw.randint(1, 5))
        ]
        piece[draw.randrange(len(piece))] = draw.randint(0, 20), draw.randint(1, 20)
        cases.append(piece)
    for piece in cases:
        for got in gathered(piece, dcp, page, torch.float32):
            assert torch.equal(got, wanted(piece)), piece


def test_fp8_latents_stay_as_they_are() -> None:
    piece = [(0, 15), (2, 3)]
    for got in gathered(piece, 2, 1, torch.float8_e4m3fn):
        assert got.dtype == torch.float8_e4m3fn
        assert torch.equal(got.float(), wanted(piece))


def test_pieces_are_few_and_hold_each_position_once() -> None:
    draw = random.Random(3)
    cases = [([10, 3], 8), ([1], 1), ([0, 0, 5], 2), ([4, 4], 4), ([7, 0, 1], 100)]
    for _ in range(50):
        prefix = [draw.choice([0, draw.randint(1, 60)]) for _ in range(5)]
        prefix[draw.randrange(5)] = draw.randint(1, 60)
        cases.append((prefix, draw.randint(1, 80)))
    for prefix, most in cases:
        starts, lens = cut_prefixes(prefix, most)
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


def test_a_short_turn_on_a_long_prefix_is_left_in_place() -> None:
    """As many numbers either way: 16 heads of 576 + 512 a new token, 576 a position."""
    sizes = dict(shard_heads=16, latent=512, rope=64)
    fits = 100 * 16 * (576 + 512) // 576
    assert gathering_moves_less(fits, 100, **sizes)
    assert not gathering_moves_less(fits + 1, 100, **sizes)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
