"""What `test_symm_a2a_gpu` checks of the kernels of `symm_a2a`, on one GPU that plays all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from helpers import symm_cases as cases
from helpers.symm_build import Defines
from helpers.symm_cases import Case, Data
from helpers.symm_layers import Step
from helpers.symm_sim import SimulatedRanks, exchange_over, loopback
from sglang_dcp.distributed.exchange.symm_a2a.workspace import _watch_faults

CHUNKS = 2048
STEPS = 400
REDUCE, GATHER = cases.reduce_cases(), cases.gather_cases()


@lru_cache(maxsize=None)
def simulated(world_size: int) -> SimulatedRanks:
    """One for all cases: each goes on where the last one left the inboxes."""
    return SimulatedRanks(world_size, CHUNKS)


def check_reduce(case: Case) -> None:
    ranks, data = simulated(case.world_size), cases.random_data(case, seed=5)
    call = reducing(case, data, ranks)
    results = [ranks.all(call) for _ in range(2)]
    for rank in range(case.world_size):
        (out, lse), (again, lse_again) = (result[rank] for result in results)
        assert same_bits(out, again)
        assert same_bits(lse, lse_again)
        assert out.is_contiguous() and out.dtype == cases.DTYPES[case.dtype]
        ideal, ideal_lse = cases.wanted(case, data, rank)
        error = cases.relative_error(out, ideal)
        by_a2a = cases.relative_error(cases.merged_by_a2a(case, data, rank), ideal)
        assert error <= cases.ROUNDING[case.dtype]
        # In fp32 both are as exact as exp is: the last bit of it may go either way.
        assert error <= 1.05 * by_a2a + 1e-7, f"{error:.2e}, a2a {by_a2a:.2e}"
        tol = cases.LSE_TOLERANCE
        torch.testing.assert_close(lse, ideal_lse.float(), rtol=tol, atol=tol)


def reducing(case: Case, data: Data, ranks: SimulatedRanks) -> Callable[..., Any]:
    outs = [cases.arranged(out, case.layout) for out in data.outs]
    lses = [cases.arranged_lse(lse, case.layout) for lse in data.lses]
    every = data.empty if data.empty is not None else [None] * case.world_size
    empty = [cases.arranged_empty(rows, case.layout) for rows in every]

    def call(rank: int) -> Any:
        return ranks.exchanges[rank].reduce(
            outs[rank],
            lses[rank],
            empty_rows=empty[rank],
            is_lse_base_on_e=case.base == "e",
        )

    return call


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_gather(case: Case) -> None:
    ranks = simulated(case.world_size)
    generator = torch.Generator("cuda").manual_seed(3)
    shape = (case.tokens, case.world_size * case.heads, case.dim)
    dtype = cases.Q_DTYPES[case.dtype]
    size = (*shape[:-1], case.dim * dtype.itemsize // 4)
    bounds = -(2**31), 2**31
    words = torch.randint(*bounds, size, generator=generator, device="cuda")
    # Any bit pattern but EMPTY, which may come as another NaN.
    q = words.masked_fill(words == -1, 0).to(torch.int32).view(dtype)
    own = [cases.arranged(part, case.layout) for part in q.chunk(case.world_size, 1)]
    for got in ranks.all(lambda rank: ranks.exchanges[rank].gather_heads(own[rank])):
        assert got.is_contiguous() and same_bits(got, q)


def check_gather_of_empty_words(world_size: int) -> None:
    ranks = simulated(world_size)
    q = torch.full((2 * world_size * 128,), -1, dtype=torch.int32, device="cuda")
    for dtype in cases.Q_DTYPES.values():
        own = q.view(dtype).view(1, 2 * world_size, -1)[:, :2, :128]
        for got in ranks.all(lambda rank: ranks.exchanges[rank].gather_heads(own)):
            assert got.float().isnan().all()


def check_sequence(world_size: int) -> None:
    """Calls change size and kind as a server's do, eager and replayed, data always new."""
    ranks, generator = simulated(world_size), torch.Generator("cuda").manual_seed(1)
    steps = [Step(ranks, size) for size in cases.SEQUENCE]
    order = torch.randint(0, 2 * len(steps), (STEPS,), generator=torch.Generator())
    worst = torch.zeros(STEPS, device="cuda")
    for number, choice in enumerate(order.tolist()):
        step, captured = steps[choice // 2], choice % 2 == 1
        worst[number] = step.run(generator, captured)
    assert worst.isfinite().all() and worst.max() < cases.ROUNDING["bf16"], (
        f"step {worst.nan_to_num(nan=9e9).argmax().item()}: "
        f"{worst.nan_to_num(nan=9e9).max().item()}"
    )


def check_loopback(world_size: int = cases.LOOPBACK) -> None:
    """One kernel and no other rank: what a sanitizer can follow."""
    for case, rank in cases.loopback_cases(world_size):
        exchange = exchange_over(loopback(world_size, rank, chunks=64))
        for seed in range(3):
            drawn = cases.random_data(case, seed)
            assert drawn.empty is not None
            out, lse, empty = drawn.outs[0], drawn.lses[0], drawn.empty[0]
            got, _ = exchange.reduce(
                cases.arranged(out, case.layout),
                cases.arranged_lse(lse, case.layout),
                empty_rows=empty,
                is_lse_base_on_e=True,
            )
            # Rank p's part is the heads that would have gone to it.
            outs = torch.stack(out.chunk(world_size, 1)).repeat(1, 1, world_size, 1)
            lses = torch.stack(lse.chunk(world_size, 1)).repeat(1, 1, world_size)
            data = Data(outs, lses, empty.expand(world_size, -1))
            ideal, _ = cases.wanted(case, data, 0)
            assert cases.relative_error(got, ideal) < cases.ROUNDING["bf16"]
            q = out[:, : case.heads].nan_to_num(1.0)
            gathered = exchange.gather_heads(q)
            assert same_bits(gathered, q.repeat(1, world_size, 1))


def check_nothing_missed(missed: list[Defines]) -> None:
    """Else this file takes minutes again."""
    assert missed == []


def checks(missed: list[Defines]) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "loopback", check_loopback
    for name, case in REDUCE.items():
        yield name, partial(check_reduce, case)
    for name, case in GATHER.items():
        yield name, partial(check_gather, case)
    for world_size in cases.EMPTY_WORDS:
        yield f"empty-words-N{world_size}", partial(
            check_gather_of_empty_words, world_size
        )
    for world_size in cases.WORLDS:
        yield f"sequence-N{world_size}", partial(check_sequence, world_size)
    yield "all-were-compiled-before", partial(check_nothing_missed, missed)


def wait_in_vain() -> None:
    """Ranks 0 and 2 of three exchange, rank 1 never comes; ends with the CUDA error."""
    ranks = SimulatedRanks(3, CHUNKS, timeout_s=1.0)
    for workspace in ranks.workspaces:
        _watch_faults(workspace)
    case = Case(3, 64, 8, 128, "bf16", "e", "dense", False)
    call = reducing(case, cases.random_data(case, 1), ranks)
    ranks.prepare(call)
    began = time.monotonic()
    try:
        ranks.launch(call, (0, 2))
    finally:
        print(f"ended after {time.monotonic() - began:.2f} s", flush=True)
