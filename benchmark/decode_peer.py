"""The DCP that SGLang has itself, timed beside this package's layouts.

Its engine lives below a process of its own, started with `SGLANG_PLUGINS` naming no plugin of
ours, where arguments are resolved as well: a process cannot take plugins out again.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from decode_engine import Row
from decode_layouts import Layout
from decode_ranks import Message, received, run_layout


def run_upstream(
    options: argparse.Namespace, layout: Layout, model: Path
) -> Generator[Message, None, None]:
    """As `run_layout`, without this package.

    Raises
    ------
    RuntimeError
        If the process ended early (why is on stderr), or the package was in it all the same.
    """
    spawn = mp.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(options, layout, model, sender))
    with _plugins(options.off_plugins):
        process.start()
    # Else its ranks would go on if it is sent a message no more.
    sender.close()
    try:
        for message in received(receiver, layout, [process]):
            if isinstance(message, Row) and message.package != "out":
                raise RuntimeError("this package was in the processes of SGLang's DCP")
            yield message
    finally:
        # Its next message fails, and it ends its ranks.
        receiver.close()
        process.join()


def _run(
    options: argparse.Namespace, layout: Layout, model: Path, sender: Connection
) -> None:
    forward(run_layout(options, layout, model), sender)


def forward(messages: Generator[Message, None, None], sender: Connection) -> None:
    """Send what comes, None at the end; the generator is closed whatever happens."""
    try:
        for message in messages:
            sender.send(message)
        sender.send(None)
    finally:
        messages.close()


@contextmanager
def _plugins(names: str) -> Iterator[None]:
    """`SGLANG_PLUGINS` for processes that are started meanwhile."""
    before = os.environ.get("SGLANG_PLUGINS")
    os.environ["SGLANG_PLUGINS"] = names
    try:
        yield
    finally:
        if before is None:
            del os.environ["SGLANG_PLUGINS"]
        else:
            os.environ["SGLANG_PLUGINS"] = before
