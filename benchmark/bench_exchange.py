"""Time of an exchange of partial attention outputs over all GPUs of this machine.

    python benchmark/bench_exchange.py results.csv [--quick]

For each size: the exchanges of this package, the parts of `a2a`, SGLang's own exchanges
on the same tensors, and the gather of the query heads. Results are checked against float64
first; a wrong one ends the run.

A time is per call, in a CUDA graph of 20 to 256 calls. A replay then takes 400 us or more,
so hosts keep ahead of it. It is replayed many times on random data. Ranks meet before each
replay, and the slowest one counts. All columns of a size are timed twice, in turns. The
table holds median and 95th percentile of the faster time, and how much longer the other
median was. Not measured: cold caches (the attention kernel has just written what is
exchanged), eager mode, overlap with compute.

`launch` is a kernel that does next to nothing, in such a graph. `raw-a2a` is a plain
`all_to_all_single` of rows like those of `a2a`; `nccl-ag-rs` the two NCCL collectives of an
all-gather of the LSE and a reduce-scatter in fp32, without any kernel.

SGLang's own run on the DCP group that it makes itself, whose PyNccl its graph capture turns
on: `upstream` is its merge for grouped queries, with its custom all-reduce where that takes
the size, and `upstream-nccl` the same on our group, which has NCCL only; `upstream-mla` is
its `ag_rs` for latents, `upstream-a2a` its `a2a` (since 0.5.17), `upstream-gather-q` its
gather of queries.

`nvlink` and `nvlink-q` are a floor and no measurement: `launch`, and the bytes that a rank
must send. Their rate is that of a large plain copy into the next rank's memory, by all ranks
at once, measured in this run. `--quick` takes few sizes, columns and replays, for tuning.
"""

# Nothing but the standard library: this process only starts the ranks, which import torch
# and SGLang at the same time.
from __future__ import annotations

import argparse
import ctypes
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path


def gpus() -> int:
    """As many as CUDA shows this process; asked without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


# As SGLang's launcher sets it for a server with DCP.
SERVER_ENVIRONMENT = {
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_GRAPH_MIXING_SUPPORT": "0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
}
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(parent: int) -> None:
    """End this process when process `parent`, which started it, ends in whatever way.

    A caller's time limit may kill the parent, which then cannot end its ranks itself.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that started this rank has ended")


def run_rank(
    rank: int,
    world_size: int,
    folder: str,
    options: argparse.Namespace,
    began: float,
    parent: int,
) -> None:
    end_with_parent(parent)
    import exchange_ranks

    plan = exchange_ranks.Plan.of(options.quick, options.replays)
    exchange_ranks.run_rank(rank, world_size, folder, options.csv, plan, began)


def run_all(ranks: Sequence[BaseProcess]) -> int:
    """0 if all ended well; with one that did not, the others are ended."""
    for rank in ranks:
        rank.start()
    try:
        left = list(ranks)
        while left and not any(rank.exitcode for rank in ranks):
            wait([rank.sentinel for rank in left])
            left = [rank for rank in left if rank.is_alive()]
        return int(any(rank.exitcode for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def main() -> int:
    began = time.time()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="where the results go")
    parser.add_argument("--replays", type=int, help="default: 100, with --quick 30")
    parser.add_argument("--quick", action="store_true", help="few sizes and columns")
    options = parser.parse_args()
    world_size = gpus()
    if world_size < 2:
        sys.exit(f"needs 2 GPUs, found {world_size}")
    for name, value in SERVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    spawn = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        rest = (world_size, folder, options, began, os.getpid())
        return run_all(
            [
                spawn.Process(target=run_rank, args=(rank, *rest))
                for rank in range(world_size)
            ]
        )


if __name__ == "__main__":
    sys.exit(main())
