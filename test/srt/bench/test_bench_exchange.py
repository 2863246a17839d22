"""`benchmark/bench_exchange.py` without a GPU: its plan, its two rounds, its table, its ranks.

Only this file sees, without GPUs, a benchmark that would end with a traceback: two gloo ranks
run all of it, with CUDA's graphs, events and tensors played by the CPU.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator
from unittest.mock import patch

import psutil
import pytest
import torch

import bench_exchange
import exchange_ranks
import exchange_report as report
from exchange_report import Timing
from helpers.gloo_ranks import python_path
from helpers.on_cpu import OnCpu

BENCHMARK = Path(__file__).parents[3] / "benchmark"

# SGLang's other merges are Triton kernels.
COLUMNS = (
    "launch pack combine raw-a2a a2a ag_rs symm_a2a gather-q symm-gather-q "
    "upstream upstream-nccl upstream-gather-q"
).split()
SIZES = ((1, 4, 8), (3, 4, 16))


@pytest.mark.parametrize(
    "probe_us, calls", [(100.0, 20), (20.0, 20), (10.0, 40), (3.0, 134), (0.5, 256)]
)
def test_a_replay_lasts_long_enough(probe_us: float, calls: int) -> None:
    assert exchange_ranks.calls_for(probe_us) == calls


def test_the_faster_round_counts() -> None:
    timing = Timing.of([(4.0, 5.0), (3.2, 9.0)], 100)
    assert timing[:2] == (3.2, 9.0) and timing.calls == 100
    assert timing.spread == pytest.approx(0.25)


def test_floors_come_after_a_launch() -> None:
    row = {"launch": Timing(2.0, 3.0, 0.1, 200)}
    floors = exchange_ranks.with_floors((1, 64, 128), row, 2, 1e9)
    # 16 KiB and 64 LSEs, half of it sent, at 1 GB/s.
    assert floors["nvlink"].median == pytest.approx(2.0 + (16384 + 256) / 2 / 1e3)
    assert floors["nvlink-q"].p95 == pytest.approx(3.0 + 16384 / 2 / 1e3)


def test_ratios_stand_first(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"symm_a2a": Timing(3.0, 3.5, 0.02, 134), "a2a": Timing(9.0, 9.1, 0.0, 45)}
    report.print_table("title", {(1, 64, 128): row})
    _, head, line = capsys.readouterr().out.splitlines()
    names = [name.strip() for name in head.split("|")]
    assert names[:4] == ["tokens", "heads x dim", "KiB", "symm/a2a"]
    assert line.split("|")[3].strip() == "0.33" and "3.00/3.50 +2%" in line


def test_without_gpus_it_says_so() -> None:
    file = str(BENCHMARK / "bench_exchange.py")
    done = subprocess.run(
        [sys.executable, file, "x.csv"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "needs 2 GPUs, found 0\n")


def test_the_process_that_starts_the_ranks_imports_nothing_large() -> None:
    code = "import sys, bench_exchange; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def sleep_or_fail(rank: int) -> None:
    if rank == 1:
        sys.exit("wrong result")
    time.sleep(600)


def test_a_rank_that_fails_ends_the_others() -> None:
    fork = mp.get_context("fork")
    ranks = [fork.Process(target=sleep_or_fail, args=(rank,)) for rank in range(3)]
    assert bench_exchange.run_all(ranks) == 1
    assert not any(rank.is_alive() for rank in ranks)


def test_all_ranks_end_well() -> None:
    fork = mp.get_context("fork")
    ranks = [fork.Process(target=time.sleep, args=(0.1 * i,)) for i in range(3)]
    assert bench_exchange.run_all(ranks) == 0


class HostEvent:
    """A CUDA event's part here."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        return 1e3 * (later.at - self.at)


def captured_on_cpu(call: Callable[[], Any], calls: int) -> exchange_ranks.Captured:
    """A "graph" whose replay calls again, into the result of the first call."""
    result = call()

    def replay() -> None:
        for _ in range(calls):
            again = call()
        if isinstance(result, torch.Tensor):
            result.copy_(again)

    graph = SimpleNamespace(replay=replay)
    return exchange_ranks.Captured(graph, result, calls)


def exchanges_on_cpu(group: Any, sizes: Any) -> dict[str, Any]:
    from sglang_dcp.distributed.exchange import create_exchange

    every = {name: create_exchange(name, group) for name in ("a2a", "ag_rs")}
    return {**every, "symm_a2a": every["a2a"]}


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    from sglang.srt.distributed import parallel_state

    generator, init = torch.Generator, parallel_state.init_distributed_environment
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(OnCpu())
        enter(patch.object(torch, "Generator", lambda *_: generator()))
        for name in ("set_device", "synchronize"):
            enter(patch.object(torch.cuda, name, lambda *_: None))
        enter(patch.object(torch.cuda, "Event", HostEvent))
        enter(patch.object(torch.cuda, "get_device_name", lambda: "no GPU"))
        enter(patch.object(torch.cuda.nccl, "version", lambda: (0, 0, 0)))
        enter(patch.object(exchange_ranks, "capture", captured_on_cpu))
        enter(patch.object(exchange_ranks, "copy_rate", lambda _: 1e10))
        enter(patch.object(exchange_ranks, "make_exchanges", exchanges_on_cpu))
        # SGLang makes no group of its own DCP on a CPU.
        enter(patch.object(parallel_state, "is_cuda", lambda: True))
        enter(
            patch.object(
                parallel_state,
                "init_distributed_environment",
                lambda **more: init(**{**more, "backend": "gloo"}),
            )
        )
        yield


def run_worker(rank: int, folder: Path) -> int:
    from sglang.srt.plugins import load_plugins

    # For what lets SGLang make groups without NCCL; with a GPU the ranks do without.
    load_plugins()
    plan = exchange_ranks.Plan(SIZES, COLUMNS, 3)
    with cuda_on_cpu(), patch.object(exchange_ranks, "REPLAY_US", 1000.0):
        target = folder / "out.csv"
        exchange_ranks.run_rank(rank, 2, str(folder), target, plan, time.time())
    return 0


def test_two_ranks_run_all_of_it(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(BENCHMARK),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    out, progress = said[0]
    assert out.startswith("DCP 2, no GPU, bf16, peer copy 10 GB/s") and not said[1][0]
    assert "symm/a2a" in out and "(3, 4, 16) done" in progress
    with (tmp_path / "out.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    wanted = {*COLUMNS, "nvlink", "nvlink-q"}
    assert {row["operation"] for row in rows} == wanted
    assert len(rows) == len(SIZES) * len(wanted)
    assert all(float(row["median_us"]) > 0 and int(row["calls"]) >= 20 for row in rows)


STARTS_RANKS = """
import multiprocessing, os, sys, time
import bench_exchange

def rank(number, folder, parent):
    bench_exchange.end_with_parent(parent)
    with open(f"{folder}/{number}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    rest = sys.argv[1], os.getpid()
    ranks = [spawn.Process(target=rank, args=(n, *rest)) for n in range(2)]
    bench_exchange.run_all(ranks)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=str)
def test_no_rank_outlives_the_process_that_started_it(
    sent: signal.Signals, tmp_path: Path
) -> None:
    """As `timeout` ends it: a rank left running would hold its GPU."""
    script = tmp_path / "starts_ranks.py"
    script.write_text(STARTS_RANKS)
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK)}
    starter = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=environment
    )
    pids = [int(wait_for(tmp_path / str(rank))) for rank in range(2)]
    starter.send_signal(sent)
    starter.wait(30)
    gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30
    )
    assert not alive


def wait_for(path: Path) -> str:
    """What is in a file that another process writes, once something is."""
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.1)
    pytest.fail(f"{path} was not written")


def test_the_ranks_get_a_plan() -> None:
    # What the starting process hands over, as spawn would pickle it.
    options = argparse.Namespace(quick=True, replays=None, csv=Path("x.csv"))
    with patch.object(exchange_ranks, "run_rank") as run:
        bench_exchange.run_rank(1, 2, "folder", options, 0.0, os.getppid())
    plan = run.call_args.args[4]
    assert plan.columns == exchange_ranks.QUICK_COLUMNS and plan.replays == 30
    assert len(plan.sizes) < len(exchange_ranks.SIZES) // 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_worker(int(sys.argv[2]), Path(sys.argv[3])))
    sys.exit(pytest.main([__file__]))
