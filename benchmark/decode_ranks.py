"""The processes of an engine: one a GPU, and what the first of them sends."""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing as mp
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Optional, Union

import torch

import bench_release
from decode_engine import Engine, Row
from decode_layouts import Layout
from decode_models import DIRECT, PREFILLED, vocab_size
from decode_profile import Profile
from decode_runner import server_args, stop_fused_write

FILL_ROUNDS = 3
Message = Union[str, Row, Profile]


@torch.no_grad()
def run_rank(
    options: argparse.Namespace,
    layout: Layout,
    args: Any,
    nccl_port: int,
    rank: int,
    results: Connection,
    turn: Event,
) -> None:
    """One rank of an engine; rank 0 sends its messages, None at the end."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    if layout.is_upstream:
        stop_fused_write()
    bench_release.import_runner()
    turn.wait()
    engine = Engine(args, nccl_port, rank, vocab_size(options.model))
    for message in _messages(engine, options, layout):
        if rank == 0:
            results.send(message)
    if rank == 0:
        results.send(None)
    # The parent ends all ranks: a graph's communicators have nothing to save.
    time.sleep(3600)


def _messages(
    engine: Engine, options: argparse.Namespace, layout: Layout
) -> Iterator[Message]:
    yield "engine ready, KV pool filled"
    # In turns, so that a drift of the machine meets both.
    fills = (DIRECT, PREFILLED) * FILL_ROUNDS if options.check_fill else (DIRECT,)
    for context in options.contexts:
        for batch in options.batches:
            for fill in fills:
                row = engine.measure(layout, batch, context, options.steps, fill)
                yield row
            if row.median_ms and [context, batch] in options.profile:
                kernels = engine.profile(batch, context)
                yield Profile(layout.name, context, batch, 1e3 * row.median_ms, kernels)


def run_layout(
    options: argparse.Namespace, layout: Layout, model: Path
) -> Generator[Message, None, None]:
    """What rank 0 of the layout's engine sends; the ranks live meanwhile.

    Raises
    ------
    RuntimeError
        If a rank ended before the first one was done.
    """
    with _restored_environment():
        yield from _run_layout(options, layout, model)


def _run_layout(
    options: argparse.Namespace, layout: Layout, model: Path
) -> Generator[Message, None, None]:
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.server_args import PortArgs

    args = server_args(options, layout, model)
    _set_envs_and_config(args)
    port = PortArgs.init_new(args).nccl_port
    spawn = mp.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    turn = spawn.Event()
    rest = (options, layout, args, port)
    ranks = [
        spawn.Process(target=run_rank, args=(*rest, rank, sender, turn))
        for rank in range(options.tp)
    ]
    for rank in ranks:
        rank.start()
    with _alone(options.turns):
        turn.set()
        try:
            yield from received(receiver, layout, ranks)
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.join()


@contextmanager
def _alone(file: Optional[Path]) -> Iterator[None]:
    """Keep other runs that take turns by `file` off the GPUs; without one, do nothing."""
    if file is None:
        yield
        return
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def received(
    receiver: Connection, layout: Layout, processes: Sequence[BaseProcess]
) -> Iterator[Message]:
    """Messages until None comes; RuntimeError if a process ends before."""
    while True:
        ready = wait([receiver, *(process.sentinel for process in processes)])
        if receiver not in ready:
            codes = [process.exitcode for process in processes]
            raise RuntimeError(f"{layout.name}: a process ended, exit codes {codes}")
        try:
            message = receiver.recv()
        except EOFError:
            raise RuntimeError(f"{layout.name}: its process ended early") from None
        if message is None:
            return
        yield message


@contextmanager
def _restored_environment() -> Iterator[None]:
    """SGLang sets variables for its children that must not reach the next layout's."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
