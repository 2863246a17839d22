"""GPU tests: the mark that skips them, and NCCL ranks of a file that is its own worker.

`python test_x.py --worker FOLDER` with RANK and WORLD_SIZE set is one rank; after each case
it adds a line `[case name, fault or ""]` to `{RANK}.jsonl`. Ranks are spawned and not
forked, as importing SGLang on a GPU machine initialises CUDA.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import shared_gpus
from helpers.gloo_ranks import Outcomes
from helpers.parallel import init_groups

RANKS_TIMEOUT_S = 240
# Of one eager collective: how long a rank waits for one that failed.
NCCL_TIMEOUT_S = 60


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skip where fewer ranks have room; one spelling of the reason for every count."""
    found = shared_gpus.places()
    return pytest.mark.skipif(
        found < count, reason=f"needs {count} GPUs, found {found}"
    )


def child_environment(**more: str) -> dict[str, str]:
    """This environment (its NCCL variables must stay) with `more`, .pyc files allowed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", **more}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


class Ranks:
    """A worker file's ranks: started when the first test asks, judged as they go.

    A case has passed if every rank said so and then went on to another case, or ended
    well: what a rank said last before it died counts for nothing.
    """

    def __init__(
        self, file: str, world_size: int, folder: Path, **environment: str
    ) -> None:
        self._file, self._world_size, self._folder = file, world_size, folder
        self._environment = environment
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._deadline = 0.0

    def assert_passed(self, name: str) -> None:
        """Fail with what each rank reported for case `name`; waits until they did."""
        if not self._deadline:
            self._deadline = time.monotonic() + ranks_timeout_s()
            atexit.register(self._kill)
            self._ranks = [self.start(rank) for rank in range(self._world_size)]
        while (faults := self._faults_of(name)) is None and self._running():
            time.sleep(0.1)
        # What was said between the last look and the end.
        faults = faults or self._faults_of(name)
        if faults is None:
            pytest.fail(f"the ranks did not get past this case\n{self._end()}")
        if any(faults):
            pytest.fail("\n".join(f"rank {r}: {f}" for r, f in enumerate(faults)))

    def _faults_of(self, name: str) -> list[str] | None:
        """What each rank said of the case, or None where one may still fail in it."""
        faults = []
        for rank, process in enumerate(self._ranks):
            # Before its file: what it said last was said before it ended.
            ended_well = process.poll() == 0
            outcomes = read_outcomes(self._folder, rank)
            last = next(reversed(outcomes), None)
            if name not in outcomes or (name == last and not ended_well):
                return None
            faults.append(outcomes[name])
        return faults

    def _running(self) -> bool:
        codes = [rank.poll() for rank in self._ranks]
        # A rank that failed leaves the others in a collective: do not wait for them.
        if any(codes) or time.monotonic() > self._deadline:
            self._kill()
            return False
        return None in codes

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()

    def _end(self) -> str:
        return "\n".join(
            f"rank {rank}, exit status {process.poll()}:\n{self.stderr(rank)[-4000:]}"
            for rank, process in enumerate(self._ranks)
        )

    def start(self, rank: int) -> subprocess.Popen[bytes]:
        """One rank, for tests that watch the processes themselves."""
        place = {"RANK": str(rank), "WORLD_SIZE": str(self._world_size)}
        environment = {**self._environment, **place}
        if shared_gpus.are_shared_by(self._world_size):
            environment |= {
                **shared_gpus.environment(self._world_size),
                "NCCL_HOSTID": f"rank-{rank}",
            }
        with (self._folder / f"stderr{rank}").open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, self._file, "--worker", str(self._folder)],
                env=child_environment(**environment),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def stderr(self, rank: int) -> str:
        return (self._folder / f"stderr{rank}").read_text(errors="replace")


def ranks_timeout_s() -> float:
    """Of all cases of a file; `SGLANG_DCP_TEST_RANKS_S` where a call gives less time."""
    return float(os.environ.get("SGLANG_DCP_TEST_RANKS_S", RANKS_TIMEOUT_S))


def record(outcomes: Outcomes, folder: Path, rank: int) -> None:
    """In a worker: leave each outcome in the rank's file before the next case begins."""
    began = time.monotonic()
    with (folder / f"{rank}.jsonl").open("w") as lines:
        for name, fault in outcomes:
            print(json.dumps([name, fault]), file=lines, flush=True)
            # To see what takes time, and the last case before one that hangs.
            print(f"[{time.monotonic() - began:.1f} s] {name}", file=sys.stderr)


def read_outcomes(folder: Path, rank: int) -> dict[str, str]:
    """`{case name: fault or ""}` of a rank, in order, as far as it got."""
    file = folder / f"{rank}.jsonl"
    if not file.exists():
        return {}
    # A line without its end is still being written.
    lines = file.read_text().split("\n")[:-1]
    return dict(json.loads(line) for line in lines)


def ranks_fixture(file: str) -> Any:
    """Return a fixture: worker `file`'s ranks by world size, started once a module."""

    @pytest.fixture(scope="module")
    def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
        started: dict[int, Ranks] = {}

        def of_world(world_size: int) -> Ranks:
            folder = tmp_path_factory.mktemp(f"ranks{world_size}")
            return started.setdefault(world_size, Ranks(file, world_size, folder))

        return of_world

    return ranks_of


def run_rank(body: Callable[[Any], Outcomes], folder: Path) -> int:
    """In a worker: the outcomes of `body(DCP group)`, left in the rank's file."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with nccl_world(rank, world_size, folder) as group:
        record(body(group), folder, rank)
        torch.cuda.synchronize()
    return 0


@contextmanager
def nccl_world(rank: int, world_size: int, folder: Path) -> Iterator[Any]:
    """In a worker: SGLang's NCCL groups, DCP's made by the hook; yields the DCP group."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.config import DcpConfig
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.distributed.groups import get_dcp_group
    from sglang_dcp.distributed.topology import Layout

    torch.cuda.set_device(rank % torch.cuda.device_count())
    load_plugins()
    # A file store needs no port, so there is none to lose to another process.
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store",
        local_rank=rank % torch.cuda.device_count(),
        backend="nccl",
        timeout=NCCL_TIMEOUT_S,
    )
    set_context(DcpContext(DcpConfig(Layout(world_size, 1)), rank))
    parallel_state.set_custom_all_reduce(False)
    init_groups(world_size)
    # Fresh tensors hold NaN: an element that no one writes shows.
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device="cuda").new_empty(3).isnan().all()
    yield get_dcp_group()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `call` as SGLang captures one, and the result that replays fill."""
    from sglang.srt.distributed import parallel_state

    graph = torch.cuda.CUDAGraph()
    with parallel_state.graph_capture() as context:
        # Compiles kernels and connects NCCL's peers, which a capture cannot.
        call()
        context.stream.synchronize()
        with torch.cuda.graph(graph, stream=context.stream):
            result = call()
    return graph, result
