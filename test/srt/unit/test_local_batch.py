"""Local batches against a walk over every position, on CPU.

The torch reference runs here; the kernel, in Triton's interpreter, in a worker
(`--worker`) where it stands in for the reference. Only this file sees what a rank does
with padding, stale static tensors and rows that share a batch but not a length.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from helpers.local_batch_cases import (
    BLOCK,
    CASES,
    Case,
    Step,
    check_case,
    each_case,
    make_batch,
    poison_fresh_tensors,
)
from sglang_dcp.layers.local_batch import LocalBatchBuilder


@each_case
def test_reference_equals_walk(name: str) -> None:
    check_case(CASES[name], "cpu")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return interpreter.results_of(__file__)


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
    assert LocalBatchBuilder(table, 2, rank, 1).build(batch).has_cached_kv is reads


def test_extend_replaces_prefix_lengths_and_leaves_the_batch_alone() -> None:
    table, batch = small_batch("extend")
    before = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    }
    local = LocalBatchBuilder(table, 2, 1, 1).build(batch).forward_batch
    assert local.extend_prefix_lens.tolist() == [2, 0]
    assert local.extend_prefix_lens_cpu == [2, 0]
    assert local.extend_seq_lens_cpu == [1, 1]
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[name]), name
        else:
            assert value == before[name], name


def test_rows_are_masked_only_if_one_is_empty() -> None:
    table, batch = small_batch("extend")
    some = LocalBatchBuilder(table, 2, 1, 1).build(batch)
    assert some.forward_batch.seq_lens_cpu.tolist() == [2, 0]
    assert some.rows_to_mask is some.empty_rows
    every = LocalBatchBuilder(table, 2, 0, 1).build(batch)
    assert every.forward_batch.seq_lens_cpu.tolist() == [3, 1]
    assert not every.empty_rows.any() and every.rows_to_mask is None


def test_replays_share_their_tensors() -> None:
    table, batch = small_batch("replay")
    builder = LocalBatchBuilder(table, 2, 0, 1)
    builder.init_static(4)
    first, second = builder.build_static(batch), builder.build_static(batch)
    for name in ("seq_lens", "out_cache_loc"):
        a, b = getattr(first.forward_batch, name), getattr(second.forward_batch, name)
        assert a.data_ptr() == b.data_ptr() != getattr(batch, name).data_ptr()
    assert first.empty_rows.data_ptr() == second.empty_rows.data_ptr()


@pytest.mark.parametrize(
    ("mode", "slots"), [("decode", [12]), ("extend", [12]), ("decode", [12, 7, 0])]
)
def test_slots_must_match_tokens(mode: str, slots: list[int]) -> None:
    """Else an eager forward would write K/V to slots that no one filled in."""
    table, batch = small_batch(mode, slots=slots)
    with pytest.raises(ValueError, match=f"{len(slots)} slots for 2 new tokens"):
        LocalBatchBuilder(table, 2, 0, 1).build(batch)


def test_static_tensors_must_exist() -> None:
    table, batch = small_batch("replay")
    with pytest.raises(AssertionError, match="init_static"):
        LocalBatchBuilder(table, 2, 0, 1).build_static(batch)


def test_other_devices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="meta: cuda or cpu"):
        LocalBatchBuilder(torch.empty(2, 8, device="meta"), 2, 0, 1)


def faults_of_kernel() -> dict[str, str]:
    """In the worker: every case with the kernel where the reference would run."""
    from sglang_dcp.layers import local_batch, local_batch_triton

    assert local_batch_triton.BLOCK == BLOCK
    local_batch.fill_local_tensors_torch = local_batch_triton.fill_local_tensors
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
