"""Worlds of gloo ranks whose body makes SGLang's groups itself."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from helpers.gloo_ranks import run_python

TIMEOUT_S = 90


def run_worker(file: str, folder: Path, *world_sizes: int) -> None:
    """Run ``file --worker`` in a session of its own and show its stderr if it fails."""
    done = run_python(
        file,
        "--worker",
        str(folder),
        *map(str, world_sizes),
        timeout_s=TIMEOUT_S,
        SGLANG_NCCL_SO_PATH="/nonexistent/libnccl.so",
    )
    assert done.code == 0, done.stderr[-4000:]


def fork_worlds(body: Any, folder: str, *world_sizes: str) -> int:
    """Exit status 0 if ``body(rank, world_size, store)`` ends well on every rank."""
    import sglang.srt.distributed.parallel_state  # noqa: F401

    context = multiprocessing.get_context("fork")
    for world_size in map(int, world_sizes):
        store = f"{folder}/store{world_size}"
        ranks = [
            context.Process(target=body, args=(rank, world_size, store))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            return 1
    return 0


def join_world(rank: int, world_size: int, store: str) -> None:
    import torch
    from sglang.srt.distributed import parallel_state

    torch.set_num_threads(1)
    # A file store needs no port, so there is none to lose to another process.
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{store}",
        local_rank=rank,
        backend="gloo",
    )
