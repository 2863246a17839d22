"""Live CPU servers for tests, and plugins for them that exist in one test only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from helpers.gloo_ranks import python_path
from helpers.prefork import PreforkedServer
from sglang_dcp.demo.server import ServerProcess

READY_SECONDS = 600


def launched(
    model: Path,
    flags: str,
    env: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
) -> ServerProcess:
    """A float32 server to enter: entering starts it and waits for nothing.

    For servers that start side by side: a start is mostly one core's work. A ``fresh``
    server runs in new interpreters, as a user's does. So does one with a plugin of its
    own. Others are forked, which saves two thirds of the start: see ``prefork``.
    """
    args = ["--dtype", "float32", "--random-seed", "0", *flags.split()]
    if not fresh:
        # Without it each idle scheduler takes a core from the servers beside it.
        args.append("--sleep-on-idle")
    forked = not fresh and "PYTHONPATH" not in (env or {})
    kind = PreforkedServer if forked else ServerProcess
    return kind(model, args, env=env, grace=0.0)


@contextmanager
def server(
    model: Path,
    flags: str,
    env: Mapping[str, str] | None = None,
    *,
    fresh: bool = False,
) -> Iterator[ServerProcess]:
    """A float32 server that answers; gone with all its processes afterwards."""
    with launched(model, flags, env, fresh=fresh) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def everything_of(running: ServerProcess) -> list[psutil.Process]:
    """The server's main process first, then all that it started."""
    assert running._process is not None
    leader = psutil.Process(running._process.pid)
    return [leader, *leader.children(recursive=True)]


def title(process: psutil.Process) -> str:
    """Its command line, which SGLang's processes replace by what they are."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def plugin_folder(folder: Path, name: str, source: str) -> dict[str, str]:
    """Environment in which SGLang finds a plugin `name` whose module is `source`.

    `source` defines `load()`.
    """
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        f"[sglang.srt.plugins]\n{name} = {name}:load\n"
    )
    return {"PYTHONPATH": python_path(folder)}
