"""The live servers of a benchmark: their flags, their start, and the turn of each.

A server that fails leaves a line, and the others go on.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from decode_layouts import Layout
from decode_quantization import flag_value
from sglang_dcp.demo.server import ServerFailed, ServerProcess

BEGAN = time.perf_counter()
# What a server can fail with: it does not start, is lost, ends within a reply, or answers
# what it should not.
FAILURES = (RuntimeError, OSError, HTTPException)


class Named(Protocol):
    """What a benchmark knows a server by: a `Layout`, or more than that."""

    @property
    def name(self) -> str: ...


Subject = TypeVar("Subject", bound=Named)
Make = Callable[[Subject], ServerProcess]
Measure = Callable[[Subject, ServerProcess], None]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {text}", flush=True)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """How the servers start, beside the options of their engines."""
    parser.add_argument(
        "--start-together",
        action="store_true",
        help="start all servers at once, and measure one after the other",
    )
    parser.add_argument(
        "--ready-s",
        type=float,
        default=200.0,
        help="seconds for a server to start, or for all with --start-together",
    )


def groups_of(
    options: argparse.Namespace, layouts: Sequence[Layout]
) -> list[Sequence[Layout]]:
    """Return which servers are up together, as `add_server_options` lets a user say it."""
    return [layouts] if options.start_together else [[one] for one in layouts]


def server_flags(options: argparse.Namespace, layout: Layout) -> list[str]:
    flags = ["--load-format", "dummy", "--dtype", "bfloat16", "--random-seed", "0"]
    flags += ["--tp", str(options.tp), "--page-size", str(options.page_size)]
    flags += ["--attention-backend", layout.attention]
    flags += ["--kv-cache-dtype", options.kv_cache_dtype]
    flags += ["--mem-fraction-static", str(options.mem_fraction)]
    most = max(options.concurrency)
    flags += ["--max-running-requests", str(most), "--sampling-backend", "pytorch"]
    if quantization := flag_value(options.quantization):
        flags += ["--quantization", quantization]
    if options.max_total_tokens:
        flags += ["--max-total-tokens", str(options.max_total_tokens)]
    if options.device == "cuda":
        flags += ["--cuda-graph-max-bs-decode", str(most)]
    if layout.dcp_size > 1:
        flags += ["--dcp-size", str(layout.dcp_size)]
    if layout.dcp_size > 1 and not layout.is_upstream:
        flags += ["--dcp-comm-backend", layout.comm]
    if layout.q == "replicated":
        flags += ["--dcp-replicate-q-proj"]
    # As `test/srt/gpu` starts its servers; `run_gpu.sh` says which release needs what.
    return flags + os.environ.get("SGLANG_DCP_TEST_SERVER_FLAGS", "").split()


def log_beside(results: Path, name: str) -> Path:
    """Return the log of the server `name`, in the folder of the results."""
    log = f"{results.stem}-{name}.log"
    return results.with_name(log.replace(":", "-").replace(" ", "-"))


def new_server(
    options: argparse.Namespace,
    layout: Layout,
    model: Path,
    log: Path,
    flags: Sequence[str],
    env: Mapping[str, str],
) -> ServerProcess:
    """Return a server that is not started yet; `flags` come after those of its layout."""
    # Servers that start beside each other load at different times on each GPU.
    more = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    if layout.is_upstream:
        more["SGLANG_PLUGINS"] = options.off_plugins
    return ServerProcess(
        model,
        [*server_flags(options, layout), *flags],
        log_path=log,
        env={**env, **more},
        device=options.device,
        grace=5.0,
    )


def who(options: argparse.Namespace, layout: Layout) -> tuple[str, int, str, str, str]:
    """Return model, tp, GPU, layout and attention backend: the first columns of a CSV."""
    on_gpu = options.device == "cuda"
    gpu = torch.cuda.get_device_name() if on_gpu else platform.machine()
    return options.model, options.tp, gpu, layout.name, layout.attention


def record_servers(
    file: Path,
    fields: Sequence[str],
    groups: Iterable[Sequence[Subject]],
    ready_s: float,
    make: Make[Subject],
    rows_of: Callable[[Subject, str], Iterable[Sequence[Any]]],
) -> list[str]:
    """Write the rows of each server into a CSV as they come; see `measure_servers`.

    `rows_of` gets the server's URL.
    """
    with file.open("w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(fields)
        # A run that is ended before its first row leaves the head.
        lines.flush()

        def measure(served: Subject, server: ServerProcess) -> None:
            for row in rows_of(served, server.base_url):
                table.writerow(row)
                lines.flush()

        return measure_servers(groups, ready_s, make, measure)


def measure_servers(
    groups: Iterable[Sequence[Subject]],
    ready_s: float,
    make: Make[Subject],
    measure: Measure[Subject],
) -> list[str]:
    """Measure each server alone, and return a line for each that failed.

    The servers of a group are up together, and idle while another one is measured. They
    end before the next group starts. All of a group have to be ready after `ready_s`.
    """
    errors: list[str] = []
    for group in groups:
        errors += _measure_group(group, make, measure, ready_s)
    return errors


def _measure_group(
    group: Sequence[Subject],
    make: Make[Subject],
    measure: Measure[Subject],
    ready_s: float,
) -> list[str]:
    errors: list[str] = []
    with ExitStack() as stack:
        for served, server in _ready(stack, group, make, ready_s, errors):
            try:
                measure(served, server)
                if server.returncode is not None:
                    raise ServerFailed(f"the server ended:\n{server.log_tail()}")
            except FAILURES as error:
                _note(errors, served, error)
    return errors


def _ready(
    stack: ExitStack,
    group: Sequence[Subject],
    make: Make[Subject],
    ready_s: float,
    errors: list[str],
) -> list[tuple[Subject, ServerProcess]]:
    """Start all of them, and return those that got ready; `stack` ends them."""
    began = time.monotonic()
    found = []
    for served, server in _started(stack, group, make, errors):
        try:
            server.wait_ready(max(1.0, began + ready_s - time.monotonic()))
            found.append((served, server))
            say(f"{served.name}: ready after {time.monotonic() - began:.0f} s")
        except FAILURES as error:
            _note(errors, served, error)
            # It would still load and capture while others are measured.
            server.stop()
    return found


def _started(
    stack: ExitStack, group: Sequence[Subject], make: Make[Subject], errors: list[str]
) -> list[tuple[Subject, ServerProcess]]:
    found = []
    for served in group:
        say(f"{served.name}: starting its server")
        try:
            found.append((served, stack.enter_context(make(served))))
        except FAILURES as error:
            _note(errors, served, error)
    return found


def _note(errors: list[str], served: Named, error: Exception) -> None:
    errors.append(f"{served.name}: {error}")
    say(errors[-1])
