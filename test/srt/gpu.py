"""GPU tests: the mark that skips them, and NCCL ranks of a file that is its own worker.

`python test_x.py --worker FOLDER` with RANK and WORLD_SIZE set is one rank; it leaves
`{RANK}.json`, `{case name: fault or ""}`. Ranks are spawned and not forked, as importing
SGLang on a GPU machine initialises CUDA.
"""

from __future__ import annotations

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

from utils import Outcomes

RANKS_TIMEOUT_S = 240
# Of one eager collective: how long a rank waits for one that failed.
NCCL_TIMEOUT_S = 60


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Skip where torch sees fewer GPUs; one spelling of the reason for every count."""
    found = torch.cuda.device_count()
    return pytest.mark.skipif(
        found < count, reason=f"needs {count} GPUs, found {found}"
    )


def child_environment(**more: str) -> dict[str, str]:
    """This environment (its NCCL variables must stay) with `more`, .pyc files allowed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", **more}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


class Ranks:
    """Outcomes of a worker file's ranks, run once, when the first test asks for them."""

    def __init__(
        self, file: str, world_size: int, folder: Path, **environment: str
    ) -> None:
        self._file, self._world_size, self._folder = file, world_size, folder
        self._environment = environment
        self._faults: list[Outcomes] = []
        self._log: str | None = None

    def assert_passed(self, name: str) -> None:
        """Fail with what each rank reported for case `name`."""
        if self._log is None:
            self._log = "the ranks were started"
            self._log = self._run()
        if not self._faults:
            pytest.fail(f"the ranks did not finish\n{self._log}")
        faults = [of_rank[name] for of_rank in self._faults]
        if any(faults):
            pytest.fail("\n".join(f"rank {r}: {f}" for r, f in enumerate(faults)))

    def _run(self) -> str:
        ranks = [self._start(rank) for rank in range(self._world_size)]
        deadline = time.monotonic() + RANKS_TIMEOUT_S
        try:
            # A rank that failed leaves the others in a collective: do not wait for them.
            while time.monotonic() < deadline and not any(r.poll() for r in ranks):
                if all(rank.poll() == 0 for rank in ranks):
                    break
                time.sleep(0.2)
        finally:
            codes = [rank.poll() for rank in ranks]
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
                    rank.wait()
        if codes == [0] * self._world_size:
            files = [self._folder / f"{r}.json" for r in range(self._world_size)]
            self._faults = [json.loads(file.read_text()) for file in files]
        return "\n".join(
            f"rank {rank}, exit status {code}:\n{self._stderr(rank)[-4000:]}"
            for rank, code in enumerate(codes)
        )

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        place = {"RANK": str(rank), "WORLD_SIZE": str(self._world_size)}
        environment = {**self._environment, **place}
        with (self._folder / f"stderr{rank}").open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, self._file, "--worker", str(self._folder)],
                env=child_environment(**environment),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def _stderr(self, rank: int) -> str:
        return (self._folder / f"stderr{rank}").read_text(errors="replace")


def run_rank(body: Callable[[Any], Outcomes], folder: Path) -> int:
    """In a worker: the outcomes of `body(KVP group)`, left in the rank's file."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with nccl_world(rank, world_size, folder) as group:
        outcomes = body(group)
        torch.cuda.synchronize()
        (folder / f"{rank}.json").write_text(json.dumps(outcomes))
    return 0


@contextmanager
def nccl_world(rank: int, world_size: int, folder: Path) -> Iterator[Any]:
    """In a worker: SGLang's NCCL groups, DCP's made by the seam; yields the KVP group."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.config import DcpConfig
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.distributed.groups import get_kvp_group
    from sglang_dcp.distributed.topology import Layout

    torch.cuda.set_device(rank)
    load_plugins()
    # A file store needs no port, so there is none to lose to another process.
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store",
        local_rank=rank,
        backend="nccl",
        timeout=NCCL_TIMEOUT_S,
    )
    set_context(DcpContext(DcpConfig(Layout(world_size, 1)), rank))
    parallel_state.set_custom_all_reduce(False)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    # Fresh tensors hold NaN: an element that no one writes shows.
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device="cuda").new_empty(3).isnan().all()
    yield get_kvp_group()
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
