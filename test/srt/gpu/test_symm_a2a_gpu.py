"""Kernels of `symm_a2a` on one GPU that plays all ranks of a group at once.

Only this file sees the kernels' arithmetic for each size, dtype and log base, every kind
of empty shard and poison, and what a rank that never comes does to the others. It says
nothing of NVLink: `test_symm_a2a_ranks_gpu.py` does. The file is its own worker.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.gloo_ranks import Finished, Outcomes, fault_of, run_command, run_python
from helpers.nccl_ranks import Ranks, needs_gpus, record
from helpers.symm_build import (
    Defines,
    compiled_up_front,
    device_arch,
    simulation_variants,
)
from helpers.symm_checks import check_loopback, checks, wait_in_vain
from helpers.symm_sim import ENVIRONMENT

pytestmark = needs_gpus(1)

TOOLS = ("memcheck", "racecheck")
Beside = dict[str, Future[Finished]]


def simulate(folder: Path) -> int:
    # Fresh tensors hold NaN: an element that no kernel writes shows.
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device="cuda").new_empty(3).isnan().all()
    record(outcomes(), folder, 0)
    torch.cuda.synchronize()
    return 0


def outcomes() -> Outcomes:
    missed: list[Defines] = []
    with compiled_up_front(simulation_variants(), device_arch(), missed):
        for name, check in checks(missed):
            yield name, fault_of(check)


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(__file__, 1, tmp_path_factory.mktemp("symm"), **ENVIRONMENT)


@pytest.mark.parametrize("name", [name for name, _ in checks([])])
def test_simulated_ranks(name: str, simulation: Ranks) -> None:
    simulation.assert_passed(name)


def absent() -> Finished:
    return run_python(__file__, "--absent", timeout_s=60, **ENVIRONMENT)


def sanitized(tool: str) -> Finished:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    # PyTorch asks the driver for entry points that it may lack: no error of a kernel.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return run_command(*command, sys.executable, __file__, "--loopback", timeout_s=120)


@pytest.fixture(scope="module", autouse=True)
def beside(request: pytest.FixtureRequest) -> Iterator[Beside]:
    """Processes of the tests below, beside the simulation: most of each is its start."""
    chosen = " ".join(item.name for item in request.session.items)
    calls = {"never_comes": absent}
    if shutil.which("compute-sanitizer"):
        calls |= {tool: partial(sanitized, tool) for tool in TOOLS}
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(calls[name]) for name in calls if name in chosen}


def test_a_rank_that_never_comes_ends_the_others(beside: Beside) -> None:
    done = beside["never_comes"].result()
    assert done.code != 0
    took = re.search(r"ended after (\S+) s", done.stdout)
    assert took and 0.9 < float(took[1]) < 8.0, done.stdout + done.stderr
    # The line of the log, not the exception that this file makes of a fault.
    said = r"^symm_a2a: rank [02] of its DCP group waited 1 s for rank 1,"
    assert re.search(said, done.stderr, re.MULTILINE), done.stderr
    assert "CUDA error" in done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer(tool: str, beside: Beside) -> None:
    if tool not in beside:
        pytest.skip("needs compute-sanitizer on PATH")
    done = beside[tool].result()
    assert done.code == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\b0 (errors|hazards)", done.stdout), done.stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(simulate(Path(sys.argv[2])))
    elif sys.argv[1:] == ["--absent"]:
        wait_in_vain()
    elif sys.argv[1:] == ["--loopback"]:
        check_loopback(world_size=2)
    else:
        sys.exit(pytest.main([__file__]))
