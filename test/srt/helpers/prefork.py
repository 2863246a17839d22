"""Servers that are forked from a process which has imported SGLang already.

A server on a CPU imports SGLang four times: itself, two schedulers, the detokenizer. Each
import takes about 15 s of one core. Here one process imports, and is forked.

What a forked server runs is the same: ``sglang.launch_server`` as main module, and
``spawn`` with its pickled arguments for the children. Two things differ. Modules are
imported before the plugins are loaded, and before a server's own environment is set. So a
server with a plugin of its own, or with a variable that an import reads, must start from a
new interpreter, as each plain ``ServerProcess`` does.
"""

from __future__ import annotations

import atexit
import functools
import os
import select
import signal
import socket
import subprocess
import sys

from helpers.prefork_process import send
from sglang_dcp.demo.server import ServerProcess


class PreforkedServer(ServerProcess):
    """A ``ServerProcess`` on the CPU that is forked, not executed."""

    def _spawn(self) -> Forked:  # type: ignore[override]
        return _importer().fork(self.command[2:], self._env, str(self.log_path))


class Forked:
    """The part of ``subprocess.Popen`` that ``ServerProcess`` needs.

    ``status`` is the reading end of a pipe: the pid comes first, the exit status at the
    end.
    """

    def __init__(self, status: int) -> None:
        self._status = os.fdopen(status, "rb", buffering=0)
        self.pid = int(self._line())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, negative for a signal. None while the server runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises ``subprocess.TimeoutExpired``."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("forked server", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the server, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            ready, _, _ = select.select([self._status], [], [], timeout)
            if ready:
                # Without a line the process that waits for the server was killed.
                self.returncode = int(self._line() or -signal.SIGKILL)
                self._status.close()
        return self.returncode

    def _line(self) -> bytes:
        return self._status.readline()


class _Importer:
    """The process that has imported SGLang, as its caller sees it.

    It ends with its caller.
    """

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = dict(os.environ, CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env.setdefault("OMP_NUM_THREADS", "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.prefork_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=env,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def fork(self, argv: list[str], env: dict[str, str], log_path: str) -> Forked:
        """Start ``python -m ARGV`` in a process group of its own."""
        status, theirs = os.pipe()
        message = {"argv": argv, "env": env, "log": log_path, "cwd": os.getcwd()}
        send(self._channel, message, [theirs])
        os.close(theirs)
        return Forked(status)

    def end(self) -> None:
        self._channel.close()
        self._process.wait()


@functools.cache
def _importer() -> _Importer:
    importer = _Importer()
    atexit.register(importer.end)
    return importer
