"""Processes for tests: scripts with a time limit, and gloo ranks forked from one import.

A test file that needs ranks is its own worker: `python test_x.py --worker FOLDER`
imports SGLang once, forks the ranks of each world and leaves one JSON file a rank,
`{case name: fault or ""}`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import pytest

import sglang_dcp
from helpers.parallel import init_groups, leave_groups

# Of a whole script on a busy machine; importing SGLang alone takes most of it.
SCRIPT_TIMEOUT_S = 300
# Of one collective: how long a rank waits for one that failed.
GLOO_TIMEOUT_S = 60

# Case name and its fault, or "".
Outcomes = Iterator[tuple[str, str]]
Body = Callable[[int, int], Outcomes]


class Finished(NamedTuple):
    """What a script left behind."""

    code: int
    stdout: str
    stderr: str


def run_python(
    *arguments: str, timeout_s: float = SCRIPT_TIMEOUT_S, **environment: str
) -> Finished:
    """`run_command` of this Python."""
    return run_command(sys.executable, *arguments, timeout_s=timeout_s, **environment)


def run_command(*command: str, timeout_s: float, **environment: str) -> Finished:
    """Run it in a session of its own; killed with its children when late."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
        pytest.fail(f"no end after {timeout_s} s\n{stderr[-4000:]}")
    return Finished(process.returncode, stdout, stderr)


def python_path(folder: Path) -> str:
    """PYTHONPATH of a process: `folder`, then the package under test, then the helpers."""
    package, helpers = Path(sglang_dcp.__file__).parents[1], Path(__file__).parents[1]
    return os.pathsep.join(map(str, (folder, package, helpers)))


class Worlds:
    """Outcomes of a worker script, run once, when the first test asks for them."""

    def __init__(self, file: str, folder: Path) -> None:
        self._file, self._folder = file, folder
        self._stderr: str | None = None

    def assert_passed(self, world_size: int, name: str) -> None:
        """Fail with what each rank of that world reported for case `name`."""
        if self._stderr is None:
            self._stderr = ""
            done = run_python(self._file, "--worker", str(self._folder))
            self._stderr = done.stderr[-8000:]
        files = [self._folder / f"{world_size}-{r}.json" for r in range(world_size)]
        faults = [
            json.loads(file.read_text()).get(name) if file.exists() else None
            for file in files
        ]
        if None in faults:
            pytest.fail(f"world {world_size} ended before this case\n{self._stderr}")
        if any(faults):
            pytest.fail("\n".join(f"rank {r}: {f}" for r, f in enumerate(faults)))


def fork_worlds(body: Body, folder: str, world_sizes: Iterable[int]) -> int:
    """In a worker: run `body(rank, world_size)` on the ranks of one world after another.

    The plugins are loaded before the fork. A rank that raises ends its world only.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    fork = multiprocessing.get_context("fork")
    for world_size in world_sizes:
        ranks = [
            fork.Process(target=_run_rank, args=(body, rank, world_size, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    return 0


def _run_rank(body: Body, rank: int, world_size: int, folder: str) -> None:
    import torch
    from sglang.srt.distributed import parallel_state

    torch.set_num_threads(1)
    # Fresh tensors hold NaN: an element that no one writes shows.
    torch.use_deterministic_algorithms(True)
    # A file store needs no port, so there is none to lose to another process.
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store{world_size}",
        local_rank=rank,
        backend="gloo",
        timeout=GLOO_TIMEOUT_S,
    )
    outcomes: dict[str, str] = {}
    for name, fault in body(rank, world_size):
        outcomes[name] = fault
        # Each time: a rank that dies later leaves the verdicts until then.
        (Path(folder) / f"{world_size}-{rank}.json").write_text(json.dumps(outcomes))
    parallel_state.destroy_distributed_environment()


def enter_layout(config: Any, tp_rank: int) -> Any:
    """In a rank: SGLang's groups with DCP's beside them; returns the DCP group."""
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.distributed.groups import get_dcp_group

    set_context(DcpContext(config, tp_rank))
    init_groups(config.tp_size, backend="gloo")
    return get_dcp_group()


def leave_layout() -> None:
    """In a rank: undo `enter_layout`, so that the next layout can come."""
    leave_groups()


def fault_of(check: Callable[..., None], *arguments: Any) -> str:
    """What an assertion of `check` said, or ""; ranks must go on to the next case."""
    try:
        check(*arguments)
    except (AssertionError, pytest.fail.Exception):
        return traceback.format_exc(limit=-2)
    return ""
