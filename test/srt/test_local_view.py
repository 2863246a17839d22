"""Localised batches against a walk over every position, on CPU.

The torch reference runs here; the kernel, in Triton's interpreter, in a worker
(`--worker`) where it stands in for the reference. Only this file sees what a rank does
with padding, stale static tensors and rows that share a batch but not a length.
"""

from __future__ import annotations

import json
import sys
import zlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sglang_dcp.layers.local_view import LocalView, LocalViewBuilder
from utils import run_python

# Of the kernel; a case that crosses blocks must know.
BLOCK = 1024
ROWS = 16
# Not a slot: shows where nothing was written.
UNTOUCHED = -7
MAX_BS = 20
SIZES = range(1, 9)
MODES = ("decode", "replay", "extend")


class Case(NamedTuple):
    """`replay` is decode into static tensors, padded; `gaps` a table that is a view."""

    mode: str
    dcp_size: int
    dtype: torch.dtype
    gaps: bool
    page_size: int = 1


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
    return {
        f"{c.mode}-dcp{c.dcp_size}-page{c.page_size}-{str(c.dtype)[6:]}": c
        for c in found
    }


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
    new = [1] * len(lens)
    if case.mode == "extend":
        new = [1, 2, BLOCK, 5, 1, 2 * BLOCK + 1, *([3] * (len(lens) - 6))]
    slots = torch.randint(0, 2**31 - 1, (sum(new),), generator=gen).tolist()
    if case.mode == "replay":
        # As SGLang pads: row 0, one position, and no slot.
        rows, lens, new = rows + [0] * 3, lens + [1] * 3, new + [1] * 3
    return Step(rows, lens, new, slots)


def full_step(case: Case, rank: int) -> Step:
    """Leaves slots and lengths that are not 0 in all static tensors."""
    own = [case.dcp_size * (i + 1) + rank for i in range(MAX_BS)]
    return Step([1] * MAX_BS, own, [1] * MAX_BS, own)


def make_table(case: Case, gen: torch.Generator, device: str) -> Tensor:
    """Any numbers, other ones on each rank: index math must not care what is stored."""
    positions = max(edge_lens(case.dcp_size)) + 5
    high = 2**31 - 1
    width = 2 * positions + 3 if case.gaps else positions
    wide = torch.randint(0, high, (ROWS, width), generator=gen, dtype=torch.int32)
    return wide.to(device)[:, 1::2][:, :positions] if case.gaps else wide.to(device)


def make_batch(case: Case, step: Step, device: str) -> SimpleNamespace:
    """The fields of a `ForwardBatch` that localisation reads."""

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=case.dtype, device=device)

    extend = case.mode == "extend"
    total = [a + b for a, b in zip(step.lens, step.new)] if extend else step.lens
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend),
        batch_size=len(step.rows),
        req_pool_indices=tensor(step.rows),
        seq_lens=tensor(total),
        seq_lens_cpu=torch.tensor(total),
        seq_lens_sum=sum(total),
        out_cache_loc=tensor(step.slots),
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


def check_view(view: LocalView, builder: LocalViewBuilder, wanted: Wanted) -> None:
    assert view.batch.seq_lens.tolist() == wanted.lens
    assert view.batch.seq_lens_cpu.tolist() == wanted.lens
    assert view.batch.seq_lens_sum == sum(wanted.lens)
    assert view.batch.out_cache_loc.tolist() == wanted.slots
    assert view.empty_rows.dtype == torch.bool
    assert view.empty_rows.tolist() == wanted.empty
    assert torch.equal(builder.local_table.cpu(), torch.tensor(wanted.table).int())


def check_case(case: Case, device: str) -> None:
    """All ranks of a case, each with data of its own; two forwards a rank."""
    for rank in range(case.dcp_size):
        seed = zlib.crc32(f"{case} {rank}".encode())
        gen = torch.Generator().manual_seed(seed)
        table = make_table(case, gen, device)
        builder = LocalViewBuilder(table, case.dcp_size, rank, case.page_size)
        builder.init_static(MAX_BS)
        builder.local_table.fill_(UNTOUCHED)
        if case.mode == "replay":
            builder.build_static(make_batch(case, full_step(case, rank), device))
        # The second forward meets other slots in the table.
        for _ in range(2):
            step = make_step(case, gen)
            batch = make_batch(case, step, device)
            wanted = walk(case, step, table, rank, builder.local_table)
            replay = case.mode == "replay"
            view = (builder.build_static if replay else builder.build)(batch)
            check_view(view, builder, wanted)
            dtype = torch.int64 if replay else case.dtype
            assert view.batch.seq_lens.dtype == dtype
            table.copy_(table.flip(0))


def poison_fresh_tensors() -> None:
    """An element that no one writes shows: fresh integers are large, bools True."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, dtype=torch.int64).min() > 2**60


@each_case
def test_reference_equals_walk(name: str) -> None:
    check_case(CASES[name], "cpu")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    done = run_python(
        __file__, "--worker", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""
    )
    assert done.code == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@each_case
def test_interpreted_kernel_equals_walk(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


def small_batch(mode: str, **changes: Any) -> tuple[Tensor, SimpleNamespace]:
    """A table and requests of 5 and 1 positions, with one new token each in extend."""
    case = Case(mode, 2, torch.int64, False)
    table = torch.arange(4 * 8, dtype=torch.int32).view(4, 8)
    step = Step([3, 1], [5, 1], [1, 1], [12, 7])._replace(**changes)
    return table, make_batch(case, step, "cpu")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("prefixes", "reads"), [([0, 0], False), ([0, 1], True), ([4, 0], True)]
)
def test_all_ranks_agree_on_whether_keys_are_read(
    rank: int, prefixes: list[int], reads: bool
) -> None:
    """A prefix of one token leaves rank 1 without a key, and it must still take part."""
    table, batch = small_batch("extend", lens=prefixes)
    assert LocalViewBuilder(table, 2, rank, 1).build(batch).reads_keys is reads


def test_extend_replaces_prefix_lengths_and_leaves_the_batch_alone() -> None:
    table, batch = small_batch("extend")
    before = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    local = LocalViewBuilder(table, 2, 1, 1).build(batch).batch
    assert local.extend_prefix_lens.tolist() == [2, 0]
    assert local.extend_prefix_lens_cpu == [2, 0]
    assert local.extend_seq_lens_cpu == [1, 1]
    for name, value in vars(batch).items():
        same = torch.equal if isinstance(value, Tensor) else lambda a, b: a == b
        assert same(value, before[name]), name


def test_replays_share_their_tensors() -> None:
    table, batch = small_batch("replay")
    builder = LocalViewBuilder(table, 2, 0, 1)
    builder.init_static(4)
    first, second = builder.build_static(batch), builder.build_static(batch)
    for name in ("seq_lens", "out_cache_loc"):
        a, b = getattr(first.batch, name), getattr(second.batch, name)
        assert a.data_ptr() == b.data_ptr() != getattr(batch, name).data_ptr()
    assert first.empty_rows.data_ptr() == second.empty_rows.data_ptr()


@pytest.mark.parametrize("mode", ["decode", "extend"])
def test_slots_must_match_tokens(mode: str) -> None:
    """Else an eager forward would write K/V to slots that no one filled in."""
    table, batch = small_batch(mode, slots=[12])
    with pytest.raises(ValueError, match="1 slots for 2 new tokens"):
        LocalViewBuilder(table, 2, 0, 1).build(batch)


def test_static_tensors_must_exist() -> None:
    table, batch = small_batch("replay")
    with pytest.raises(AssertionError, match="init_static"):
        LocalViewBuilder(table, 2, 0, 1).build_static(batch)


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="meta: cuda or cpu"):
        LocalViewBuilder(torch.empty(2, 8, device="meta"), 2, 0, 1)


def faults_of_kernel() -> dict[str, str]:
    """In the worker: every case with the kernel where the reference would run."""
    from sglang_dcp.layers import local_view, local_view_triton

    assert local_view_triton.BLOCK == BLOCK
    local_view.localise_ref = local_view_triton.localise
    faults = {}
    for name, case in CASES.items():
        faults[name] = ""
        try:
            check_case(case, "cpu")
        except AssertionError as error:
            faults[name] = str(error)[:500] or "differs"
    return faults


@pytest.fixture(autouse=True)
def poison() -> Any:
    poison_fresh_tensors()
    yield
    torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        poison_fresh_tensors()
        print(json.dumps(faults_of_kernel()))
        sys.exit(0)
    sys.exit(pytest.main([__file__]))
