"""Steps that succeed on all ranks of a group, or on none.

Mapping memory is collective inside of PyTorch. A rank that fails there tells no other
rank, and its peers wait for it in two ways:

- for a key of the group's store, for as long as the store's timeout;
- for a file descriptor on a socket, without any limit.

So the ranks enter together, both waits have a limit here, and afterwards the ranks agree.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, TypeVar

import torch
from torch.distributed import ProcessGroup

from sglang_dcp.distributed.all_to_all_peers import PeerGroup

T = TypeVar("T")

# What CUDA, the allocator, a store and a socket raise in PyTorch. Out of memory and all
# errors of torch.distributed are RuntimeErrors.
FAILURES = (RuntimeError, OSError)

# The peers of a rank that failed wait so long. Ranks enter at the same time, and mapping
# takes milliseconds.
WAIT_S = 60.0
# A second signal interrupts a socket that a first one did not.
_REPEAT_S = 1.0


class StepFailed(Exception):
    """A step failed on at least one rank of the group. The message is the same on all."""


def on_all_ranks(group: PeerGroup, step: Callable[[], T]) -> T:
    """Run `step` on each rank and return its result, if it succeeded on all of them.

    It is a collective over `group.cpu_group`, and a barrier: no rank returns before
    every rank has run its step.

    Raises
    ------
    StepFailed
        On all ranks, if `step` raised one of `FAILURES` on any of them.
    """
    done: list[T] = []
    fault = ""
    try:
        done.append(step())
    except FAILURES as error:
        fault = _in_one_line(error)
    faults = [""] * group.world_size
    torch.distributed.all_gather_object(faults, fault, group=group.cpu_group)
    if any(faults):
        ranks = (f"rank {rank}: {said}" for rank, said in enumerate(faults) if said)
        raise StepFailed("; ".join(ranks))
    return done[0]


def _in_one_line(error: BaseException) -> str:
    """Return type and first line. PyTorch appends a C++ stack to some messages."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")


@contextmanager
def bounded_wait(group: ProcessGroup) -> Iterator[None]:
    """Limit how long this rank waits inside of PyTorch for peers that failed.

    The limit is `WAIT_S`, or half of the store's own timeout if that is less: a rank
    that failed waits for its peers that long at least.
    """
    from torch.distributed.distributed_c10d import _get_process_group_store

    store: Any = _get_process_group_store(group)
    before = store.timeout
    limit = min(timedelta(seconds=WAIT_S), before / 2)
    store.set_timeout(limit)
    try:
        # Later than the store gives up: its message says more.
        with interrupted_after(1.5 * limit.total_seconds()):
            yield
    finally:
        store.set_timeout(before)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Interrupt a system call of the main thread that takes longer.

    PyTorch reports an interrupted `recvmsg` as a RuntimeError. Outside of the main thread
    this does nothing, because signals reach the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
