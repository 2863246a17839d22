"""Starts an SGLang server as a child, waits for it, and leaves no process behind."""

import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from sglang_dcp.demo.client import open_local

_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time. The message ends with its log."""


class ServerProcess:
    """``python -m sglang.launch_server`` with everything it spawns.

    Use it as a context manager. The server starts on entry. After exit, also by Ctrl-C,
    it is gone with its schedulers and its detokenizer. It has a process group of its own,
    so Ctrl-C on the terminal reaches only the caller. A ready server also ends when the
    thread that started it ends, even if that thread was killed.

    ``grace`` is how many seconds ``stop`` waits for the server to end by itself, which
    takes about six. With 0 it is killed at once.

    On ``device`` cpu the server sees no GPU. Each rank computes with one thread, unless
    ``OMP_NUM_THREADS`` is set. On another device the server sees the GPUs of
    ``CUDA_VISIBLE_DEVICES``.
    """

    def __init__(
        self,
        model_path: str | Path,
        args: Sequence[str] = (),
        *,
        log_path: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        grace: float = 20.0,
        device: str = "cpu",
    ) -> None:
        self.port, group_port = _free_port_pair()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._model_path = str(model_path)
        self.command = [sys.executable, "-m", "sglang.launch_server"]
        self.command += ["--model-path", self._model_path, "--device", device]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if not _has_replicas(args):
            self.command += ["--nccl-port", str(group_port)]
        self.command += args
        self._grace = grace
        self._env = _child_env(env or {}, device)
        self._log_path = Path(log_path) if log_path else None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def returncode(self) -> int | None:
        """Exit status of the server. None before its start and while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log_path(self) -> Path:
        """The file of the server's stdout and stderr."""
        if self._log_path is None:
            handle, name = tempfile.mkstemp(prefix="sglang-dcp-", suffix=".log")
            os.close(handle)
            self._log_path = Path(name)
        return self._log_path

    def start(self) -> None:
        """Start the server and return at once."""
        if self._process is not None:
            raise RuntimeError("a ServerProcess starts once; make another")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._spawn()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self.log_path.open("wb") as log:
            return _spawn(self.command, self._env, log)

    def wait_ready(
        self,
        timeout: float = 300.0,
        on_tick: Callable[[float], None] | None = None,
    ) -> float:
        """Wait until the server has generated a token, and return the seconds waited.

        ``on_tick`` is called with the seconds waited, about twice a second. Raises
        ServerFailed if the server ends, or is not ready after ``timeout`` seconds.
        """
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            if self.returncode is not None:
                raise ServerFailed(
                    f"server exited with {self.returncode} before it was ready:\n"
                    f"{self.log_tail(40)}"
                )
            if waited > timeout:
                raise ServerFailed(
                    f"server not ready in {timeout:.0f} s:\n{self.log_tail(40)}"
                )
            if on_tick is not None:
                on_tick(waited)
            if self._is_ready():
                return time.monotonic() - begin
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        """Whether this very server answers, and has generated a token.

        Raises ServerFailed if it serves another model.
        """
        # Another server may have taken the port in between, and would answer too.
        if not self._listens():
            return False
        # /health_generate returns 503 during warm-up, then runs one token through
        # every rank. /model_info answers before the ranks are ready.
        if _fetch(f"{self.base_url}/health_generate") is None:
            return False
        info = _fetch(f"{self.base_url}/model_info")
        if info is None:
            return False
        served = json.loads(info)["model_path"]
        if served != self._model_path:
            raise ServerFailed(
                f"{self.base_url} serves {served}, not {self._model_path}"
            )
        return True

    def _listens(self) -> bool:
        """Whether a process of this server's group listens on the server's port."""
        assert self._process is not None
        return any(
            connection.status == psutil.CONN_LISTEN
            and connection.laddr.port == self.port
            for member in _members(self._process.pid)
            for connection in _connections(member)
        )

    def wait_exit(self, timeout: float) -> int:
        """Wait until the server ends by itself and return its exit status.

        Raises ServerFailed if it still runs after ``timeout`` seconds.
        """
        if self._process is None:
            raise RuntimeError("the server was not started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ServerFailed(
                f"server still runs after {timeout:.0f} s:\n{self.log_tail(40)}"
            ) from None

    def stop(self) -> None:
        """End the server and every process of its group; safe to call twice."""
        if self._process is None:
            return
        group = self._process.pid
        try:
            # Only to the leader, which ends its children by itself. If a child ended
            # first, the leader would examine that as a crash for five seconds.
            if self._grace > 0:
                self._process.send_signal(signal.SIGTERM)
                _wait_empty(self._process, self._grace)
        finally:
            # This also runs if a second Ctrl-C interrupts the wait.
            _kill_all(group)
            self._process.wait()

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines of the server's log."""
        text = self.log_path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def run_to_exit(
    model_path: str | Path, args: Sequence[str], timeout: float = 120.0
) -> tuple[int, str]:
    """Run a server that should end at start. Return its exit status and whole output."""
    with tempfile.TemporaryDirectory(prefix="sglang-dcp-") as folder:
        log = Path(folder) / "server.log"
        with ServerProcess(model_path, args, log_path=log) as server:
            return server.wait_exit(timeout), log.read_text(errors="replace")


def _has_replicas(args: Sequence[str]) -> bool:
    """Whether SGLang starts several schedulers, each of which needs a port of its own.

    It gives each of them the port that was named, so none may be named.
    """
    names = ("--dp-size", "--data-parallel-size")
    return any(argument.split("=")[0] in names for argument in args)


def _child_env(more: Mapping[str, str], device: str) -> dict[str, str]:
    env = dict(os.environ)
    # Without .pyc files SGLang takes three times as long to start.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        # By default every rank has a thread for each core of the machine. With few cores
        # these threads wait for each other, and small models take six times as long.
        env.setdefault("OMP_NUM_THREADS", "1")
    env["HF_HUB_OFFLINE"] = "1"
    env.update(more)
    return env


def _spawn(
    command: Sequence[str], env: Mapping[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # A shell ignores it for what runs in the background, and would pass that on. SGLang
        # ends its own processes by it.
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        preexec_fn=end_with_parent,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


# These ports are below the kernel's ephemeral ones, which any process may get at any time.
# Processes begin at different ports, and one process takes no port twice.
_PORTS = itertools.count(10000 + os.getpid() * 64 % 16384, 2)


def free_port() -> int:
    """Return a port that is free now, and that this process has not handed out."""
    return _free_port_pair()[0]


def _free_port_pair() -> tuple[int, int]:
    while (port := next(_PORTS)) < 32768:
        if _is_free(port) and _is_free(port + 1):
            return port, port + 1
    raise ServerFailed("no free port below 32768 is left for another server")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _fetch(url: str) -> bytes | None:
    """Return the body of an answer with status 200, or None."""
    try:
        with open_local(url, timeout=10) as answer:
            return bytes(answer.read()) if answer.status == 200 else None
    except (urllib.error.URLError, HTTPException, OSError):
        return None


def _connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return []


def _members(group: int) -> list[psutil.Process]:
    """List live processes of the group. A zombie does not count."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            same = os.getpgid(process.pid) == group
        except ProcessLookupError:
            continue
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def _kill_all(group: int) -> None:
    for process in _members(group):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _wait_empty(leader: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        # poll() reaps the leader, which would stay in the group as a zombie.
        leader.poll()
        if not _members(leader.pid):
            return
        time.sleep(0.1)
