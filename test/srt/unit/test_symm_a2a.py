"""`symm_a2a` but for its kernels: which way a call goes, chunks, capacity.

Only this file sees a batch of the wrong size or at an odd address handed to the kernels,
without the GPU error that this would be.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sglang_dcp.distributed.exchange import (
    A2AExchange,
    Exchange,
    WorkspaceSpec,
    symm_a2a,
)
from sglang_dcp.distributed.exchange.fallbacks import Fallbacks
from sglang_dcp.distributed.exchange.symm_a2a import kernel as kernels
from sglang_dcp.distributed.exchange.symm_a2a import workspace as memory

CHUNK = kernels.THREADS * kernels.VECTOR_BYTES
WORLD_SIZE, RANK = 4, 1
CHUNKS = 16


def make_exchange(workspace: Any) -> symm_a2a.SymmA2AExchange:
    group: Any = SimpleNamespace(world_size=WORLD_SIZE, rank_in_group=RANK)
    with patch.object(symm_a2a, "_workspace", lambda *_: workspace):
        return symm_a2a.SymmA2AExchange(group)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By which way each call went."""
    seen: list[str] = []

    def by(name: str, result: Any = None) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return result

        return called

    monkeypatch.setattr(kernels, "reduce_heads", by("symm"))
    monkeypatch.setattr(kernels, "gather_heads", by("symm"))
    monkeypatch.setattr(A2AExchange, "_reduce", by("a2a", (None, None)))
    monkeypatch.setattr(Exchange, "gather_heads", by("a2a", torch.zeros(1)))
    return seen


def reduce_of(exchange: Exchange, tokens: int, own: int, dim: int, dtype: Any) -> Any:
    out = torch.zeros(tokens, WORLD_SIZE * own, dim, dtype=dtype)
    lse = torch.zeros(out.shape[:-1])
    return exchange.reduce(out, lse, is_lse_base_on_e=True)[0]


BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
# Rows of 256 bytes: 8 a chunk, 128 in 16 chunks.
FITS = [
    *((1, 1, 128, BF16), (16, 8, 128, BF16), (128, 1, 128, BF16)),
    *((16, 8, 64, FP32), (4, 4, 512, FP32), (2, 5, 96, torch.float16)),
]
DOES_NOT_FIT = [
    # One row too many, no whole vectors, a row longer than a block.
    *((129, 1, 128, BF16), (43, 3, 128, BF16), (17, 1, 512, FP32)),
    *((1, 1, 100, BF16), (1, 1, 6, FP32), (1, 1, 516, FP32)),
]


@pytest.mark.parametrize("size", FITS)
def test_what_fits_goes_to_the_kernels(size: Any, ways: list[str]) -> None:
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    out = reduce_of(exchange, *size)
    assert ways == ["symm"] and out.shape == size[:3] and out.dtype == size[3]
    exchange.gather_heads(torch.zeros(*size[:3], dtype=size[3]))
    assert ways == ["symm", "symm"]


@pytest.mark.parametrize("size", DOES_NOT_FIT)
def test_what_does_not_fit_goes_by_a2a(size: Any, ways: list[str]) -> None:
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    reduce_of(exchange, *size)
    exchange.gather_heads(torch.zeros(*size[:3], dtype=size[3]))
    assert ways == ["a2a", "a2a"]
    [reason] = exchange.fallbacks.counts
    whole_vectors = size[2] * size[3].itemsize in (256, 2048)
    assert exchange.fallbacks.counts[reason] == 2
    assert reason == ("capacity" if whole_vectors else "row_size")
    # Decode is served by the kernel all the same.
    assert exchange.in_use == "symm_a2a"


def test_what_fits_is_no_fall_back(ways: list[str]) -> None:
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    for size in FITS:
        reduce_of(exchange, *size)
    assert exchange.fallbacks.counts == {}


def test_an_observer_hears_of_every_fall_back_once() -> None:
    fallbacks = Fallbacks()
    fallbacks.add("early")
    fallbacks.add("early")
    heard: list[tuple[str, int]] = []
    fallbacks.observe(lambda reason, count: heard.append((reason, count)))
    fallbacks.add("late")
    fallbacks.add("early")
    assert heard == [("early", 2), ("late", 1), ("early", 1)]
    assert fallbacks.counts == {"early": 3, "late": 1}


def test_the_fall_back_is_said_once(
    ways: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    with caplog.at_level(logging.INFO):
        reduce_of(exchange, 1, 1, 128, BF16)
        assert not caplog.records
        for size in DOES_NOT_FIT:
            reduce_of(exchange, *size)
    [record] = caplog.records
    assert "129 rows of 256 bytes" in record.message and "a2a" in record.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e8m0fnu])
def test_queries_whose_words_may_all_be_ones_go_by_nccl(
    dtype: torch.dtype, ways: list[str]
) -> None:
    """In these EMPTY is a number, or the NaN sent in its place is one."""
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    exchange.gather_heads(torch.empty(1, 1, 64, dtype=dtype))
    exchange.gather_heads(torch.empty(1, 1, 64, dtype=FP8))
    assert ways == ["a2a", "symm"]
    assert exchange.fallbacks.counts == {"dtype": 1}


def test_no_tokens_go_nowhere() -> None:
    exchange = make_exchange(SimpleNamespace(chunks=CHUNKS))
    assert reduce_of(exchange, 0, 2, 128, BF16).shape == (0, 2, 128)
    q = torch.zeros(0, 2, 128, dtype=BF16)
    assert exchange.gather_heads(q).shape == (0, 8, 128)


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_unreachable_peers_are_said_once_and_go_by_a2a(
    rank: int, ways: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    group: Any = SimpleNamespace(world_size=WORLD_SIZE, rank_in_group=rank)
    with patch.object(memory, "unreachable_peer", lambda _: "a and b are two"):
        exchange = symm_a2a.SymmA2AExchange(group)
    reduce_of(exchange, 1, 1, 128, BF16)
    assert ways == ["a2a"] and exchange.in_use == "a2a"
    assert exchange.fallbacks.counts == {"unreachable": 1}
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == (rank == 0)
    assert all("a and b are two" in line and "a2a" in line for line in said)


def test_an_exchange_says_what_its_inbox_takes() -> None:
    """Two slots for each sender and chunk, and how often each chunk was used."""
    workspace = SimpleNamespace(
        chunks=CHUNKS, uses=torch.zeros(CHUNKS, dtype=torch.int32)
    )
    held = kernels.inbox_bytes(WORLD_SIZE, CHUNKS)
    assert held == 2 * WORLD_SIZE * CHUNKS * kernels.CHUNK_BYTES
    assert make_exchange(workspace).standing_bytes == held + 4 * CHUNKS
    assert make_exchange(None).standing_bytes == 0


def views() -> Iterator[tuple[str, Tensor, bool]]:
    flat = torch.arange(8192, dtype=BF16)
    rows = flat[: 4 * 6 * 64].view(4, 6, 64)
    yield "contiguous", rows, True
    yield "transposed", rows.transpose(0, 1), True
    yield "heads of a rank", rows[:, 2:4], True
    yield "one token of all", rows[:1].expand(4, 6, 64), True
    yield "half a row", rows[..., 32:], True
    yield "contiguous, off a vector", flat[3 : 3 + 4 * 6 * 64].view(4, 6, 64), False
    yield "from the fifth value", rows[..., 4:36], False
    yield "every other value", rows[..., ::2], False
    yield "odd rows", flat[: 4 * 6 * 65].view(4, 6, 65)[..., :64], False


@pytest.mark.parametrize("name, rows, stays", list(views()), ids=lambda v: str(v)[:24])
def test_rows_start_on_whole_vectors(name: str, rows: Tensor, stays: bool) -> None:
    got = symm_a2a._addressable(rows)
    assert torch.equal(got, rows) and (got is rows) == stays
    assert got.data_ptr() % 16 == 0 and got.stride(-1) == 1
    assert not any(stride * got.itemsize % 16 for stride in got.stride()[:-1])


def places_by_hand(rows: int, row_bytes: int) -> list[tuple[int, int, int, int]]:
    """(row, vector, chunk, thread) of all threads, as the kernel's `place_of` says."""
    vectors = row_bytes // kernels.VECTOR_BYTES
    rows_each = min(kernels.THREADS // vectors, kernels.MAX_ROWS)
    return [
        (chunk * rows_each + thread // vectors, thread % vectors, chunk, thread)
        for chunk in range(kernels.chunks_of(rows, row_bytes))
        for thread in range(kernels.THREADS)
        if thread // vectors < rows_each
        and chunk * rows_each + thread // vectors < rows
    ]


def test_every_vector_has_one_place() -> None:
    for vectors in range(1, kernels.THREADS + 1):
        row_bytes = vectors * kernels.VECTOR_BYTES
        assert kernels.fits_row(row_bytes)
        for rows in (1, 2, 31, 33, 100):
            found = places_by_hand(rows, row_bytes)
            wanted = itertools.product(range(rows), range(vectors))
            assert sorted(f[:2] for f in found) == list(wanted)
            assert len({f[2:] for f in found}) == len(found)
            # No chunk without a row: its counter would advance with nothing to wait for.
            chunks = kernels.chunks_of(rows, row_bytes)
            assert {f[2] for f in found} == set(range(chunks))
    assert not any(map(kernels.fits_row, (0, 8, 24, CHUNK + 16, 2 * CHUNK)))


def test_an_inbox_holds_two_places_a_sender_and_chunk() -> None:
    for world_size, chunks in itertools.product((2, 3, 8), (1, 7)):
        size = kernels.inbox_bytes(world_size, chunks)
        assert size == 2 * world_size * chunks * kernels.CHUNK_BYTES
    assert kernels.CHUNK_BYTES >= CHUNK + 4 * kernels.MAX_ROWS
    assert kernels.CHUNK_BYTES % 16 == 0


def test_capacity_is_that_of_the_largest_decode_step_up_to_a_bound() -> None:
    def capacity(*spec: int) -> int:
        return symm_a2a._capacity(WorkspaceSpec(*spec))

    for tokens, heads, row_bytes in itertools.product(
        (1, 7, 64), (1, 3, 8), (128, 1152)
    ):
        wanted = kernels.chunks_of(tokens * heads, row_bytes)
        assert capacity(tokens, heads, row_bytes) == wanted
    assert capacity(4096, 64, 2048) == symm_a2a.MAX_PAYLOAD_BYTES // CHUNK
    # Rows longer than a block go by a2a, the model's other rows do not.
    assert capacity(4, 2, 2304) == 8
    # Shorter rows than those of the spec never take more chunks.
    for row_bytes in range(16, 1152, 16):
        assert kernels.chunks_of(448, row_bytes) <= capacity(64, 7, 1152)


def test_rows_that_are_not_whole_vectors_never_reach_a_kernel() -> None:
    rows, workspace = torch.zeros(1, 1, 7), SimpleNamespace(world_size=2, rank=0)
    with pytest.raises(ValueError, match="rows of 28 bytes"):
        kernels.gather_heads(workspace, rows, rows)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
