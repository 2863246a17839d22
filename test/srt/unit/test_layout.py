"""The owner rule over all small sizes, against loops that visit every position.

Only this file catches index math that is wrong for some rank, length or page size
alone: live ranks see few sizes. The even cut (`lens // dcp_size`) is shown to differ.
"""

from __future__ import annotations

import sys
from typing import Iterator

import pytest
import torch

from sglang_dcp.ops.layout import (
    kv_heads_of_local_q,
    local_lens,
    local_slots,
    refresh_local_table,
)

SIZES = range(1, 9)
LENS = range(41)
PAGES = (1, 3, 4)
# Not a slot of any page: shows where nothing was written.
UNTOUCHED = -7

each_size = pytest.mark.parametrize("dcp_size", SIZES, ids=lambda n: f"dcp{n}")
each_page = pytest.mark.parametrize("page_size", PAGES, ids=lambda n: f"page{n}")


def owner_of(position: int, dcp_size: int) -> int:
    """Deal positions out one by one, as cards."""
    owner = 0
    for _ in range(position):
        owner = owner + 1 if owner + 1 < dcp_size else 0
    return owner


def logical_table(rows: int, positions: int, page: int, seed: int) -> torch.Tensor:
    """A slot table over shuffled logical pages; page 0 is SGLang's dummy."""
    gen = torch.Generator().manual_seed(seed)
    per_row = -(-positions // page)
    pages = 1 + torch.randperm(rows * per_row, generator=gen).view(rows, per_row, 1)
    slots = (pages * page + torch.arange(page)).view(rows, -1)
    return slots[:, :positions].int()


@each_size
def test_local_lens_count_owned_positions(dcp_size: int) -> None:
    for length in LENS:
        owners = [owner_of(p, dcp_size) for p in range(length)]
        for rank in range(dcp_size):
            assert local_lens(length, dcp_size, rank) == owners.count(rank)


@each_size
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_local_lens_of_tensor_keep_dtype_and_shape(
    dcp_size: int, dtype: torch.dtype
) -> None:
    lens = torch.arange(40, dtype=dtype).view(5, 8)
    before = lens.clone()
    for rank in range(dcp_size):
        got = local_lens(lens, dcp_size, rank)
        wanted = [local_lens(n, dcp_size, rank) for n in range(40)]
        assert got.dtype == dtype and got.shape == (5, 8)
        assert got.flatten().tolist() == wanted
    assert torch.equal(lens, before)


@each_size
def test_lens_add_up(dcp_size: int) -> None:
    for length in LENS:
        lens = [local_lens(length, dcp_size, rank) for rank in range(dcp_size)]
        assert sum(lens) == length and max(lens) - min(lens) <= 1


@pytest.mark.parametrize("dcp_size", SIZES[1:], ids=lambda n: f"dcp{n}")
def test_even_cut_is_another_rule(dcp_size: int) -> None:
    """Else the cases above could pass with `lens // dcp_size`."""
    differ = [
        length
        for length in LENS
        if any(
            local_lens(length, dcp_size, rank) != length // dcp_size
            for rank in range(dcp_size)
        )
    ]
    assert differ == [length for length in LENS if length % dcp_size]


def test_identity_without_dcp() -> None:
    lens, slots, length = torch.arange(5), torch.arange(5), 123456789
    assert local_lens(lens, 1, 0) is lens
    assert local_lens(length, 1, 0) is length
    assert local_slots(slots, 1, 0, 1) is slots


def test_others_writes_spread_over_the_first_page() -> None:
    """One page of each rank, logical slots 2 x 4 x 5 on: of 8 slots rank 0 owns 4."""
    slots = torch.arange(40, 48, dtype=torch.int32)
    assert local_slots(slots, 2, 0, 4).tolist() == [20, 0, 21, 1, 22, 2, 23, 3]
    assert local_slots(slots, 2, 1, 4).tolist() == [0, 20, 1, 21, 2, 22, 3, 23]
    assert local_slots(slots, 2, 1, 1).tolist() == [0, 20, 0, 21, 0, 22, 0, 23]


@each_size
@each_page
def test_each_slot_is_written_by_one_rank(dcp_size: int, page_size: int) -> None:
    logical_page = page_size * dcp_size
    slots = torch.arange(logical_page, 6 * logical_page)
    writers: dict[int, list[tuple[int, int]]] = {int(slot): [] for slot in slots}
    for rank in range(dcp_size):
        local = local_slots(slots, dcp_size, rank, page_size)
        assert local.dtype == slots.dtype and local.shape == slots.shape
        for slot, where in zip(slots.tolist(), local.tolist()):
            if where >= page_size:
                writers[slot].append((rank, where))
    assert all(len(found) == 1 for found in writers.values())
    # No two slots meet in one place, and a logical page is one page of each rank.
    places = [found[0] for found in writers.values()]
    assert len(set(places)) == len(places)
    for slot, [(rank, where)] in writers.items():
        assert where // page_size == slot // logical_page
        assert rank == owner_of(slot % logical_page, dcp_size)


def read_positions(
    table: torch.Tensor,
    local: torch.Tensor,
    row: int,
    length: int,
    shard: tuple[int, int],
    page_size: int,
) -> Iterator[int]:
    """Positions whose slots a rank's kernel would read, found by what is stored."""
    written = local_slots(table[row, :length], *shard, page_size)
    stored = {
        int(where): position
        for position, where in enumerate(written)
        if where >= page_size
    }
    for where in local[row, : local_lens(length, *shard)].tolist():
        yield stored[where]


@each_size
@each_page
def test_ranks_read_each_position_once_in_order(dcp_size: int, page_size: int) -> None:
    """What was written through `local_slots` is found through the local table."""
    table = logical_table(3, 40, page_size * dcp_size, seed=dcp_size)
    for length in LENS[1:]:
        read: list[int] = []
        for rank in range(dcp_size):
            local = torch.full((3, -(-40 // dcp_size)), UNTOUCHED, dtype=torch.int32)
            rows, lens = torch.tensor([2, 0]), torch.tensor([length, 40])
            refresh_local_table(local, table, rows, lens, dcp_size, rank)
            shard = dcp_size, rank
            mine = list(read_positions(table, local, 2, length, shard, page_size))
            assert mine == sorted(mine)
            read += mine
        assert sorted(read) == list(range(length))


@each_size
def test_only_rows_of_the_batch_and_up_to_their_lengths_are_written(
    dcp_size: int,
) -> None:
    table = logical_table(5, 40, 4 * dcp_size, seed=0)
    lens = {3: 40, 1: 9, 4: 0}
    for rank in range(dcp_size):
        local = torch.full((5, -(-40 // dcp_size)), UNTOUCHED, dtype=torch.int32)
        rows, asked = torch.tensor(list(lens)), torch.tensor(list(lens.values()))
        refresh_local_table(local, table, rows, asked, dcp_size, rank)
        for row in range(5):
            owned = local_lens(lens.get(row, 0), dcp_size, rank)
            assert (local[row, :owned] != UNTOUCHED).all()
            assert (local[row, owned:] == UNTOUCHED).all()


@each_size
def test_refresh_rewrites_slots_that_changed(dcp_size: int) -> None:
    old = logical_table(2, 24, dcp_size, seed=1)
    new = logical_table(2, 24, dcp_size, seed=2)
    assert not torch.equal(old, new)
    rows, lens = torch.tensor([0, 1]), torch.tensor([24, 24])
    for rank in range(dcp_size):
        local = torch.zeros(2, -(-24 // dcp_size), dtype=torch.int32)
        refresh_local_table(local, old, rows, lens, dcp_size, rank)
        before = local.clone()
        refresh_local_table(local, new, rows, lens, dcp_size, rank)
        assert not torch.equal(local, before)
        for row in range(2):
            wanted = [int(s) // dcp_size for s in new[row, rank::dcp_size]]
            assert local[row, : len(wanted)].tolist() == wanted


@each_size
def test_kv_heads_of_local_q_are_those_of_the_whole_model(dcp_size: int) -> None:
    """Local head of own query head == global head, cut by hand, for all ranks."""
    for own_q in range(1, 9):
        heads = own_q * dcp_size
        for local_kv in (n for n in range(1, heads + 1) if heads % n == 0):
            serves = [kv for kv in range(local_kv) for _ in range(heads // local_kv)]
            for rank in range(dcp_size):
                wanted = serves[rank * own_q : (rank + 1) * own_q]
                assert kv_heads_of_local_q(own_q, local_kv, dcp_size, rank) == wanted


def test_kv_heads_of_local_q_can_be_uneven() -> None:
    """Twelve query heads and three K/V heads at DCP 2: no one GQA ratio a rank."""
    assert kv_heads_of_local_q(6, 3, 2, 0) == [0, 0, 0, 0, 1, 1]
    assert kv_heads_of_local_q(6, 3, 2, 1) == [1, 1, 2, 2, 2, 2]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
