"""Batches for the local batch, and a walk over positions that says what it must be."""

from __future__ import annotations

import zlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sglang_dcp.layers.local_batch import LocalBatch, LocalBatchBuilder

# Of the kernel; a case that crosses blocks must know.
BLOCK = 1024


ROWS = 16


# Not a slot: shows where nothing was written.
UNTOUCHED = -7


MAX_BS = 20


SIZES = range(1, 9)


MODES = ("decode", "replay", "extend")


class Case(NamedTuple):
    """`replay` is decode into static tensors, padded; `gaps` a table that is a view.

    `padded` is extend with more slots than new tokens, as DP attention has it. In the other
    two modes each request has `width` query tokens.
    """

    mode: str
    dcp_size: int
    dtype: torch.dtype
    gaps: bool
    page_size: int = 1
    width: int = 1


class Step(NamedTuple):
    """One forward as the scheduler knows it. `new` is new tokens by request."""

    rows: list[int]
    lens: list[int]
    new: list[int]
    slots: list[int]


class Wanted(NamedTuple):
    lens: list[int]
    slots: list[int]
    empty: list[bool]
    table: list[list[int]]


def cases() -> dict[str, Case]:
    """Every mode and size; index dtypes, table layouts and page sizes take turns."""
    dtypes, pages = (torch.int64, torch.int32), (16, 1, 3)
    found = [
        Case(mode, n, dtypes[(n + i) % 2], n % 3 == 0, pages[(n // 2 + i) % 3])
        for i, mode in enumerate(MODES)
        for n in SIZES
    ]
    found += [Case("padded", n, torch.int64, False, n) for n in (1, 2, 4)]
    found += [
        Case(mode, n, torch.int64, False, 4, width)
        for mode in ("decode", "replay")
        for n, width in ((2, 2), (3, 5))
    ]
    names = [
        f"{c.mode}-dcp{c.dcp_size}-page{c.page_size}-{str(c.dtype)[6:]}"
        + f"-width{c.width}" * (c.width > 1)
        for c in found
    ]
    return dict(zip(names, found))


CASES = cases()


each_case = pytest.mark.parametrize("name", CASES)


def edge_lens(n: int) -> list[int]:
    """Where a shard is empty or a block ends, on one rank or another."""
    ends = [BLOCK * n + more for more in (-n, -1, 0, 1, n)]
    return [0, 1, n - 1, n, n + 1, 37, *ends]


def make_step(case: Case, gen: torch.Generator) -> Step:
    """Shuffled rows of edge lengths; the last two are one row, at different lengths."""
    lens = [*edge_lens(case.dcp_size), 50, 23]
    rows = (1 + torch.randperm(ROWS - 1, generator=gen))[: len(lens) - 1].tolist()
    rows.append(rows[-1])
    new = [case.width] * len(lens)
    if case.mode in ("extend", "padded"):
        new = [1, 2, BLOCK, 5, 1, 2 * BLOCK + 1, *([3] * (len(lens) - 6))]
    slots = torch.randint(0, 2**31 - 1, (sum(new),), generator=gen).tolist()
    if case.mode == "replay":
        # As SGLang pads: row 0, one position, and no slot.
        rows, lens, new = rows + [0] * 3, lens + [1] * 3, new + [case.width] * 3
    return Step(rows, lens, new, slots)


def full_step(case: Case, rank: int) -> Step:
    """Leaves slots and lengths that are not 0 in all static tensors."""
    own = [case.dcp_size * (i + 1) + rank for i in range(MAX_BS * case.width)]
    return Step([1] * MAX_BS, own[:MAX_BS], [case.width] * MAX_BS, own)


def make_table(case: Case, gen: torch.Generator, device: str) -> Tensor:
    """Any numbers, other ones on each rank: index math must not care what is stored."""
    positions = max(edge_lens(case.dcp_size)) + 5
    high = 2**31 - 1
    width = 2 * positions + 3 if case.gaps else positions
    wide = torch.randint(0, high, (ROWS, width), generator=gen, dtype=torch.int32)
    return wide.to(device)[:, 1::2][:, :positions] if case.gaps else wide.to(device)


def make_batch(case: Case, step: Step, device: str) -> SimpleNamespace:
    """The fields of a `ForwardBatch` that the local batch is built from."""

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=case.dtype, device=device)

    extend = case.mode in ("extend", "padded")
    padding = [0] * 3 if case.mode == "padded" else []
    total = [a + b for a, b in zip(step.lens, step.new)] if extend else step.lens
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend),
        batch_size=len(step.rows),
        req_pool_indices=tensor(step.rows),
        seq_lens=tensor(total),
        seq_lens_cpu=torch.tensor(total),
        seq_lens_sum=sum(total),
        out_cache_loc=tensor(step.slots + padding),
    )
    if extend:
        starts = [sum(step.new[:i]) for i in range(len(step.new))]
        batch.extend_start_loc = tensor(starts)
        batch.extend_prefix_lens = tensor(step.lens)
        batch.extend_prefix_lens_cpu = step.lens
        batch.extend_seq_lens = tensor(step.new)
        batch.extend_seq_lens_cpu = step.new
    return batch


def walk(case: Case, step: Step, table: Tensor, rank: int, before: Tensor) -> Wanted:
    """What a rank should see, position by position."""
    size = case.dcp_size
    logical, local = table.tolist(), before.tolist()
    lens = []
    for row, length in zip(step.rows, step.lens):
        owned = [p for p in range(length) if p % size == rank]
        for place, position in enumerate(owned):
            local[row][place] = logical[row][position] // size
        lens.append(len(owned))
    slots = []
    for slot in step.slots:
        own = slot % size == rank
        slots.append(slot // size if own else slot // size % case.page_size)
    slots += [0] * (sum(step.new) - len(slots))
    empty = [not keys for keys, count in zip(lens, step.new) for _ in range(count)]
    return Wanted(lens, slots, empty, local)


def check_view(view: LocalBatch, builder: LocalBatchBuilder, wanted: Wanted) -> None:
    assert view.forward_batch.seq_lens.tolist() == wanted.lens
    assert view.forward_batch.seq_lens_cpu.tolist() == wanted.lens
    assert view.forward_batch.seq_lens_sum == sum(wanted.lens)
    assert view.forward_batch.out_cache_loc.tolist() == wanted.slots
    assert view.empty_rows.dtype == torch.bool
    assert view.empty_rows.tolist() == wanted.empty
    assert torch.equal(builder.local_table.cpu(), torch.tensor(wanted.table).int())


def check_case(case: Case, device: str) -> None:
    """All ranks of a case, each with data of its own; two forwards a rank."""
    for rank in range(case.dcp_size):
        seed = zlib.crc32(f"{case} {rank}".encode())
        gen = torch.Generator().manual_seed(seed)
        table = make_table(case, gen, device)
        builder = LocalBatchBuilder(table, case.dcp_size, rank, case.page_size)
        builder.init_static(MAX_BS, case.width)
        builder.local_table.fill_(UNTOUCHED)
        if case.mode == "replay":
            full = make_batch(case, full_step(case, rank), device)
            builder.build_static(full, case.width)
        # The second forward meets other slots in the table.
        for _ in range(2):
            step = make_step(case, gen)
            batch = make_batch(case, step, device)
            wanted = walk(case, step, table, rank, builder.local_table)
            replay = case.mode == "replay"
            build = builder.build_static if replay else builder.build
            view = build(batch, case.width)
            check_view(view, builder, wanted)
            dtype = torch.int64 if replay else case.dtype
            assert view.forward_batch.seq_lens.dtype == dtype
            table.copy_(table.flip(0))


def poison_fresh_tensors() -> None:
    """An element that no one writes shows: fresh integers are large, bools True."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, dtype=torch.int64).min() > 2**60
