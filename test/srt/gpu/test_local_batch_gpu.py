"""The kernel of the local batch compiled for a GPU, on the cases of `test_local_batch.py`.

Only this file sees what the interpreter cannot: code generation for each size and index
dtype, 64-bit addresses, and that a forward is one launch that no one waits for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.local_batch_cases import (
    CASES,
    MAX_BS,
    MODES,
    UNTOUCHED,
    Case,
    Step,
    check_case,
    check_view,
    each_case,
    make_batch,
    make_step,
    make_table,
    poison_fresh_tensors,
    walk,
)
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.layers.local_batch import LocalBatchBuilder, LocalTensors, Shard

pytestmark = needs_gpus(1)

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    poison_fresh_tensors()
    yield
    torch.use_deterministic_algorithms(False)


@each_case
def test_kernel_equals_walk(name: str) -> None:
    check_case(CASES[name], DEVICE)


@pytest.mark.parametrize("mode", MODES)
def test_one_launch_and_no_wait(mode: str) -> None:
    gen = torch.Generator().manual_seed(0)
    case = Case(mode, 2, torch.int64, False)
    builder = LocalBatchBuilder(make_table(case, gen, DEVICE), 2, 1, case.page_size)
    builder.init_static(MAX_BS)
    build = builder.build_static if mode == "replay" else builder.build
    batch = make_batch(case, make_step(case, gen), DEVICE)
    # Poisoning fresh tensors is a launch, too; the first build compiles.
    torch.use_deterministic_algorithms(False)
    build(batch)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            build(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    launched = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert launched == ["_fill_local_tensors_kernel"]


def test_captured_step_reads_what_each_replay_brings() -> None:
    """A graph over the static tensors of the largest batch, replayed after smaller ones."""
    gen = torch.Generator().manual_seed(1)
    case = Case("replay", 4, torch.int64, False, page_size=16)
    table = make_table(case, gen, DEVICE)
    builder = LocalBatchBuilder(table, 4, 2, case.page_size)
    builder.init_static(MAX_BS)
    builder.local_table.fill_(UNTOUCHED)
    captured = builder.build_static(make_batch(case, make_step(case, gen), DEVICE))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read = [
            tensor.clone()
            for tensor in (
                captured.forward_batch.seq_lens,
                captured.forward_batch.out_cache_loc,
                captured.empty_rows,
            )
        ]
    for real in (13, 3, 10):
        step = make_step(case, gen)
        padding = len(step.rows) - real
        step = Step(
            step.rows[:real] + [0] * padding,
            step.lens[:real] + [1] * padding,
            step.new,
            step.slots[:real],
        )
        wanted = walk(case, step, table, 2, builder.local_table)
        view = builder.build_static(make_batch(case, step, DEVICE))
        graph.replay()
        check_view(view, builder, wanted)
        assert [t.tolist() for t in read] == [wanted.lens, wanted.slots, wanted.empty]


def far_rows(memory: Tensor, columns: int) -> Tensor:
    """Two rows whose distance takes more than 32 bits, in elements."""
    return memory.as_strided((2, columns), (2**31, 1))


def test_rows_further_apart_than_32_bits() -> None:
    from sglang_dcp.layers.local_batch_triton import fill_local_tensors

    gen = torch.Generator().manual_seed(2)
    case = Case("decode", 2, torch.int64, False)
    table, local = (
        far_rows(torch.empty(2**31 + 64, dtype=torch.int32, device=DEVICE), columns)
        for columns in (64, 32)
    )
    table.copy_(torch.randint(0, 2**31 - 1, (2, 64), generator=gen))
    local.fill_(UNTOUCHED)
    step = Step([1, 0], [63, 40], [1, 1], [12, 7])
    batch = make_batch(case, step, DEVICE)
    out = LocalTensors(
        torch.empty_like(batch.seq_lens),
        torch.empty_like(batch.out_cache_loc),
        torch.empty(2, dtype=torch.bool, device=DEVICE),
    )
    wanted = walk(case, step, table, 1, local)
    fill_local_tensors(Shard(table, local, 2, 1, 1), batch, batch.seq_lens, 63, out)
    assert local.tolist() == wanted.table
    assert [t.tolist() for t in out] == [wanted.lens, wanted.slots, wanted.empty]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
