"""`symm_a2a` between real ranks: NVLink, thousands of replays, fallbacks, a killed peer.

Only this file sees what the memory system between GPUs does to the protocol. Ranks drift
apart, and replays follow each other without a wait of the host. Eager calls of other sizes
and NCCL come between. All ranks draw the same numbers, hold other parts of them and
compare with a float64 merge on the GPU. The file is its own worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import symm_cases as cases
from helpers.gloo_ranks import Outcomes, fault_of
from helpers.nccl_ranks import Ranks, needs_gpus, ranks_fixture, run_rank
from helpers.symm_build import (
    Defines,
    compiled_up_front,
    device_arch,
)
from helpers.symm_layers import Batch
from helpers.symm_ranks import CAPTURED, SPEC, checks, variants
from sglang_dcp.distributed.exchange import (
    create_exchange,
)

WORLDS = (2, 4, 8)
# Of the run with a killed peer. Elsewhere ranks may wait for each other's compilers.
TIMEOUT_S = 10.0
# Of a survivor, from the death of its peer to its own end.
BOUND_S = TIMEOUT_S + 30
KILLED, KILLED_AFTER = 1, 500
KILL = "SYMM_A2A_TEST_KILL"


def body(group: Any) -> Outcomes:
    if os.environ.get(KILL):
        replay_until_killed(group)
    world_size = group.world_size
    missed: list[Defines] = []
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


ranks_of = ranks_fixture(__file__)


every_world = pytest.mark.parametrize(
    "world_size", [pytest.param(n, marks=needs_gpus(n), id=f"dcp{n}") for n in WORLDS]
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
        said = f"rank {rank} of its DCP group waited {TIMEOUT_S:g} s for rank {KILLED},"
        assert said in ranks.stderr(rank), ranks.stderr(rank)[-4000:]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_rank(body, Path(sys.argv[2])))
    sys.exit(pytest.main([__file__]))
