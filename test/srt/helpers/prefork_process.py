"""The process that imports SGLang once, and what is forked from it. See ``prefork``.

Each process returns from the code that forked it, and then runs what it is for. So it ends
as an interpreter of its own would, with its exit status and its ``atexit`` functions.

The processes: the importer; a watcher for each server, which reports its end; the server;
and its children, forked before the server has changed anything, which wait for their work.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import re
import runpy
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import spawn, util
from typing import Any

import setproctitle

Work = Callable[[], None]

# What imports nearly all that a CPU server has imported once it is ready.
MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.registry",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.dllm.algorithm",
    "torch.export",
    "torch.fx.experimental.validator",
    "torch.utils.cpp_extension",
    "uvicorn.protocols.http.auto",
)
# As many as four ranks, the detokenizer and one more. A server spawns any others.
CHILDREN = 6
_ABOVE_ALL_FDS = 500
_MAX_FDS = 64
_MAX_BYTES = 1 << 17
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def send(channel: socket.socket, message: Any, fds: Sequence[int]) -> None:
    """Send a message that JSON can hold, with open files."""
    socket.send_fds(channel, [json.dumps(message).encode()], list(fds))


def receive(channel: socket.socket) -> tuple[Any, list[int]] | None:
    """Receive a message and its open files. None where the sender has ended."""
    data, fds, _, _ = socket.recv_fds(channel, _MAX_BYTES, _MAX_FDS)
    return (json.loads(data), fds) if data else None


def main(channel: socket.socket) -> None:
    """Import, then fork a server for each message until the sender ends."""
    for name in MODULES:
        importlib.import_module(name)
    # It looks for the memory of the title here, as servers replace their environment.
    setproctitle.getproctitle()
    gc.collect()
    gc.freeze()
    work = _serve(channel)
    if work is not None:
        work()


def _serve(channel: socket.socket) -> Work | None:
    while (received := receive(channel)) is not None:
        message, (status,) = received
        if os.fork() == 0:
            channel.close()
            return _watch(message, status)
        os.close(status)
        _reap_watchers()
    return None


def _reap_watchers() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _watch(message: Any, status: int) -> Work | None:
    _end_with_parent(signal.SIGKILL)
    pid = os.fork()
    if pid == 0:
        return _begin_server(message, status)
    _, ended = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
    return None


def _begin_server(message: Any, status: int) -> Work:
    os.setsid()
    _end_with_parent(signal.SIGTERM)
    # As `ServerProcess` does.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # Only now: who knows the pid may kill the group.
    os.write(status, b"%d\n" % os.getpid())
    os.close(status)
    children: list[_Child] = []
    for _ in range(CHILDREN):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            for other in (ours, *(child.channel for child in children)):
                other.close()
            return functools.partial(_wait_for_work, theirs)
        theirs.close()
        children.append(_Child(pid, ours))
    return functools.partial(_run_server, message, children)


def _end_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


@dataclass
class _Child:
    """A process that waits for what the server would spawn."""

    pid: int
    channel: socket.socket


def _run_server(message: Any, children: list[_Child]) -> None:
    _take_over(message)
    spawning = util.spawnv_passfds
    util.spawnv_passfds = functools.partial(_hand_over, children, spawning)
    name, *arguments = message["argv"]
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _take_over(message: Any) -> None:
    """Set what a new interpreter would get from its caller."""
    os.environ.clear()
    os.environ.update(message["env"])
    os.chdir(message["cwd"])
    import numpy

    numpy.random.seed()


def _hand_over(
    children: list[_Child],
    spawning: Callable[[bytes, Sequence[Any], Sequence[int]], int],
    path: bytes,
    args: Sequence[Any],
    fds: Sequence[int],
) -> int:
    """Take the place of ``multiprocessing.util.spawnv_passfds``. Returns the pid."""
    if args[-1] != "--multiprocessing-fork" or not children:
        return spawning(path, args, fds)
    child = children.pop(0)
    message = {
        "call": args[-2],
        "fds": list(fds),
        "env": dict(os.environ),
        "cwd": os.getcwd(),
    }
    send(child.channel, message, fds)
    child.channel.close()
    return child.pid


def _wait_for_work(channel: socket.socket) -> None:
    received = receive(channel)
    if received is None:
        return
    message, fds = received
    channel.close()
    _take_over(message)
    _renumber(fds, message["fds"])
    sys.argv = ["-c", "--multiprocessing-fork"]
    numbers = re.findall(r"(\w+)=(\d+)", message["call"])
    spawn.spawn_main(**{name: int(value) for name, value in numbers})


def _renumber(fds: Sequence[int], wanted: Sequence[int]) -> None:
    """Give open files the numbers that the pickled arguments name."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_ALL_FDS) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(high, wanted, strict=True):
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
