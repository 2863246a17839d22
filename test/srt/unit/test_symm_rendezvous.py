"""How long a rank waits inside of PyTorch for a peer that failed.

Only this file sees a wait without an end: on a GPU it would need a fault at one moment.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.distributed.exchange.symm_a2a import rendezvous
from sglang_dcp.distributed.exchange.symm_a2a.rendezvous import (
    StepFailed,
    bounded_wait,
    interrupted_after,
    on_all_ranks,
)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group with the store of a server, behind two prefixes as PyTorch's is."""
    from torch.distributed import PrefixStore, TCPStore, distributed_c10d

    server = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=40))
    store = PrefixStore("group", PrefixStore("default", server))
    monkeypatch.setattr(distributed_c10d, "_get_process_group_store", lambda _: store)
    return SimpleNamespace(store=store, server=server)


def test_a_wait_for_a_key_of_a_failed_peer_ends(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "WAIT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(rendezvous.FAILURES), bounded_wait(group):
        group.store.get("never set")
    assert 0.4 < time.monotonic() - start < 5
    assert group.server.timeout == timedelta(
        seconds=40
    ), "it is the store of all groups"


def test_the_limit_is_less_than_the_store_allows_a_failed_rank(group: Any) -> None:
    with bounded_wait(group):
        assert group.server.timeout == timedelta(seconds=20)
        assert 29 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_socket_without_a_limit_is_interrupted() -> None:
    """PyTorch receives a peer's descriptor so: by one call, which it does not repeat."""
    libc = ctypes.CDLL(None, use_errno=True)
    mine, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        start = time.monotonic()
        with interrupted_after(0.3):
            got = libc.recv(mine.fileno(), ctypes.create_string_buffer(2), 2, 0)
        assert (got, ctypes.get_errno()) == (-1, errno.EINTR)
        assert 0.2 < time.monotonic() - start < 5
    finally:
        mine.close()
        peer.close()


def test_the_alarm_of_others_is_put_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: heard.append(number))
    try:
        with interrupted_after(0.05):
            time.sleep(0.2)
        assert not heard and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        os.kill(os.getpid(), signal.SIGALRM)
        assert heard == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_are_left_alone() -> None:
    """Python sets handlers in the main thread only."""
    faults: list[Exception] = []

    def enter() -> None:
        try:
            with interrupted_after(0.1):
                pass
        except ValueError as error:
            faults.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert not faults


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            RuntimeError("CUDA driver error: x\nframe 0"),
            "RuntimeError: CUDA driver error: x",
        ),
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
        (torch.distributed.DistStoreError("late"), "DistStoreError: late"),
        (OSError(28, "No space"), "OSError: [Errno 28] No space"),
        (RuntimeError(), "RuntimeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cuda_and_stores_raise_is_a_failed_step(
    raised: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_gather(into: list[str], mine: str, group: Any) -> None:
        into[:] = ["", mine]

    def step() -> None:
        raise raised

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    two: Any = SimpleNamespace(world_size=2, cpu_group=None)
    with pytest.raises(StepFailed) as caught:
        on_all_ranks(two, step)
    assert str(caught.value) == f"rank 1: {said}"


def test_a_fault_of_our_own_code_is_not_hidden() -> None:
    def step() -> None:
        raise AttributeError("a typing error")

    two: Any = SimpleNamespace(world_size=2, cpu_group=None)
    with pytest.raises(AttributeError):
        on_all_ranks(two, step)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
