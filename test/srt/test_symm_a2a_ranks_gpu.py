"""`symm_a2a` between real ranks: NVLink, thousands of replays, fall-backs, a killed peer.

Only this file sees what the memory system between GPUs does to the protocol: ranks drift
apart, replays follow each other without a wait of the host, eager calls of other sizes
and NCCL come between. All ranks draw the same numbers, hold other parts of them and
compare with a float64 merge on the GPU. The file is its own worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import symm_cases as cases
from gpu import Ranks, needs_gpus, run_rank
from sglang_dcp.distributed.exchange import (
    A2AExchange,
    Exchange,
    WorkspaceSpec,
    create_exchange,
)
from symm_build import (
    Defines,
    compiled_up_front,
    device_arch,
    layer_variants,
    reduce_variant,
)
from symm_cases import Case
from symm_layers import Batch
from utils import Outcomes, fault_of

WORLDS = (2, 4, 8)
REPLAYS = 10_000
# Of the run with a killed peer. Elsewhere ranks may wait for each other's compilers.
TIMEOUT_S = 10.0
# Of a survivor, from the death of its peer to its own end.
BOUND_S = TIMEOUT_S + 30
KILLED, KILLED_AFTER = 1, 500
KILL = "SYMM_A2A_TEST_KILL"
SPEC = WorkspaceSpec(tokens=64, heads=8, row_bytes=256, timeout_s=60.0)
# tokens, own heads, head dim
CAPTURED = ((8, 4, 128), (1, 4, 128), (33, 3, 96))
EAGER = ((5, 4, 128), (64, 8, 128))
OVERSIZED = (200, 8, 128)


def check_replays(group: Any, replays: int = REPLAYS) -> None:
    """No wait of the host in between: ranks run ahead of each other as they like."""
    exchange = create_exchange("symm_a2a", group, SPEC)
    batches = [Batch(group, exchange, size) for size in CAPTURED]
    graphs = [(batch, batch.captured()) for batch in batches]
    eager = [(b, b.call) for b in (Batch(group, exchange, size) for size in EAGER)]
    large = Batch(group, exchange, OVERSIZED)
    generator = torch.Generator("cuda").manual_seed(4)
    order = torch.randint(0, 3, (replays,), generator=torch.Generator().manual_seed(4))
    errors: list[Tensor] = []
    fallbacks: list[Any] = []
    by_a2a = A2AExchange._reduce

    def counted(*arguments: Any) -> Any:
        fallbacks.append(arguments[1].shape)
        return by_a2a(*arguments)

    with patch.object(A2AExchange, "_reduce", counted):
        for number, choice in enumerate(order.tolist()):
            runs = [graphs[choice]]
            if number % 3 == 0:
                runs.append(eager[number % 2])
            if number % 200 == 0:
                runs.append((large, large.call))
            if number % 7 == group.rank_in_group:
                # Cycles: some 100 us in which the others go ahead.
                torch.cuda._sleep(200_000)
            errors += [batch.worst(generator, run) for batch, run in runs]
    worst = torch.stack(errors).nan_to_num(nan=9e9)
    assert worst.max() < cases.ROUNDING["bf16"], (
        f"{(worst >= cases.ROUNDING['bf16']).sum().item()} of {len(errors)} runs, first "
        f"{(worst >= cases.ROUNDING['bf16']).int().argmax().item()}, {worst.max():.1e}"
    )
    # The oversized batches, two layers each, and nothing else.
    assert len(fallbacks) == 2 * -(-replays // 200)


def check_case(group: Any, case: Case) -> None:
    """Poison and empty shards over NVLink, as `test_symm_a2a_gpu` has them on one GPU."""
    rank, data = group.rank_in_group, cases.random_data(case, seed=6)
    empty = None if data.empty is None else data.empty[rank]
    out, lse = exchange_of(group).reduce(
        cases.arranged(data.outs[rank], case.layout),
        cases.arranged_lse(data.lses[rank], case.layout),
        empty_rows=empty,
        is_lse_base_on_e=case.base == "e",
        return_lse=True,
    )
    ideal, ideal_lse = cases.wanted(case, data, rank)
    assert cases.relative_error(out, ideal) <= cases.ROUNDING[case.dtype]
    tolerance = {"rtol": cases.LSE_TOLERANCE, "atol": cases.LSE_TOLERANCE}
    torch.testing.assert_close(lse, ideal_lse.float(), **tolerance)


_EXCHANGES: dict[int, Exchange] = {}


def exchange_of(group: Any) -> Exchange:
    """One for all cases, as a server has one for all layers."""
    if id(group) not in _EXCHANGES:
        spec = WorkspaceSpec(tokens=64, heads=32, row_bytes=2048, timeout_s=60.0)
        _EXCHANGES[id(group)] = create_exchange("symm_a2a", group, spec)
    return _EXCHANGES[id(group)]


def cases_of(world_size: int) -> dict[str, Case]:
    """The cases of two simulated ranks, at this width."""
    found = [c for c in cases.reduce_cases().values() if c.world_size == 2]
    return {
        "reduce-T{1}-h{2}-D{3}-{4}-{5}-{6}-{7}".format(*c): c._replace(
            world_size=world_size
        )
        for c in found
        if c.tokens <= 64
    }


def variants(world_size: int, rank: int) -> Iterator[Defines]:
    """Of all kernels that a rank's `checks` launch."""
    for case in cases_of(world_size).values():
        yield reduce_variant(case, rank)
    yield from layer_variants(world_size, [rank], (*CAPTURED, *EAGER))


def check_nothing_missed(missed: list[Defines]) -> None:
    """Else ranks wait for each other's compilers."""
    assert missed == []


def checks(
    world_size: int, group: Any, missed: list[Defines]
) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in cases_of(world_size).items():
        yield name, partial(check_case, group, case)
    yield "replays", partial(check_replays, group)
    yield "all-were-compiled-before", partial(check_nothing_missed, missed)


def body(group: Any) -> Outcomes:
    if os.environ.get(KILL):
        replay_until_killed(group)
    world_size, missed = group.world_size, []
    of_rank = variants(world_size, group.rank_in_group)
    with compiled_up_front(of_rank, device_arch(), missed, share=world_size):
        for name, check in checks(world_size, group, missed):
            yield name, fault_of(check)


def replay_until_killed(group: Any) -> None:
    spec = replace(SPEC, timeout_s=TIMEOUT_S)
    exchange = create_exchange("symm_a2a", group, spec)
    batch = Batch(group, exchange, CAPTURED[0])
    replay, generator = batch.captured(), torch.Generator("cuda").manual_seed(4)
    for number in range(100 * KILLED_AFTER):
        if number == KILLED_AFTER and group.rank_in_group == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        assert batch.worst(generator, replay).item() < cases.ROUNDING["bf16"]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    started: dict[int, Ranks] = {}

    def of_world(world_size: int) -> Ranks:
        folder = tmp_path_factory.mktemp(f"symm{world_size}")
        return started.setdefault(world_size, Ranks(__file__, world_size, folder))

    return of_world


every_world = pytest.mark.parametrize(
    "world_size", [pytest.param(n, marks=needs_gpus(n), id=f"kvp{n}") for n in WORLDS]
)


@every_world
@pytest.mark.parametrize("name", [name for name, _ in checks(2, None, [])])
def test_every_rank(name: str, world_size: int, ranks_of: Any) -> None:
    ranks_of(world_size).assert_passed(name)


@every_world
def test_a_killed_peer_ends_the_others(world_size: int, tmp_path: Path) -> None:
    ranks = Ranks(__file__, world_size, tmp_path, **{KILL: "1"})
    processes = [ranks.start(rank) for rank in range(world_size)]
    try:
        code = processes[KILLED].wait(120)
        assert code == -signal.SIGKILL, ranks.stderr(KILLED)[-4000:]
        deadline = time.monotonic() + BOUND_S
        for rank, process in enumerate(processes):
            code = process.wait(max(0.1, deadline - time.monotonic()))
            assert code != 0, f"rank {rank} ended as if nothing had happened"
    except subprocess.TimeoutExpired:
        said = "\n".join(ranks.stderr(rank)[-2000:] for rank in range(world_size))
        pytest.fail(f"a rank has not ended\n{said}")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for rank in set(range(world_size)) - {KILLED}:
        said = f"rank {rank} of its KVP group waited {TIMEOUT_S:g} s for rank {KILLED},"
        assert said in ranks.stderr(rank), ranks.stderr(rank)[-4000:]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_rank(body, Path(sys.argv[2])))
    sys.exit(pytest.main([__file__]))
