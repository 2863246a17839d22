"""The live servers of a benchmark: their flags, their start, and the turn of each.

A server that fails leaves a line, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from decode_layouts import Layout
from decode_quantization import flag_value
from sglang_dcp.demo.server import ServerFailed, ServerProcess

BEGAN = time.perf_counter()
# What a server that was reached, or that answered nonsense, can end with.
FAILURES = (RuntimeError, OSError)
Make = Callable[[Layout], ServerProcess]
Measure = Callable[[Layout, ServerProcess], None]


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
        "--ready-s", type=float, default=200.0, help="for a server to start"
    )


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


def new_server(
    options: argparse.Namespace,
    layout: Layout,
    model: Path,
    results: Path,
    flags: Sequence[str],
    env: Mapping[str, str],
) -> ServerProcess:
    """Not started yet; its log lies beside `results`."""
    log = results.with_name(f"{results.stem}-{layout.name}.log")
    plugins = {"SGLANG_PLUGINS": options.off_plugins} if layout.is_upstream else {}
    return ServerProcess(
        model,
        [*server_flags(options, layout), *flags],
        log_path=log.with_name(log.name.replace(":", "-")),
        env={**env, **plugins},
        device=options.device,
        grace=5.0,
    )


def measure_servers(
    options: argparse.Namespace,
    layouts: Sequence[Layout],
    make: Make,
    measure: Measure,
) -> list[str]:
    """Measure each server alone, and return a line for each that failed.

    With `--start-together` they are all up meanwhile, else each starts after the last.
    """
    together = [layouts] if options.start_together else [[one] for one in layouts]
    errors: list[str] = []
    for group in together:
        errors += _measure_group(group, make, measure, options.ready_s)
    return errors


def _measure_group(
    layouts: Sequence[Layout], make: Make, measure: Measure, ready_s: float
) -> list[str]:
    errors: list[str] = []
    with ExitStack() as stack:
        for layout, server in _ready(stack, layouts, make, ready_s, errors):
            try:
                measure(layout, server)
                if server.returncode is not None:
                    raise ServerFailed(f"the server ended:\n{server.log_tail()}")
            except FAILURES as error:
                _note(errors, layout, error)
    return errors


def _ready(
    stack: ExitStack,
    layouts: Sequence[Layout],
    make: Make,
    ready_s: float,
    errors: list[str],
) -> list[tuple[Layout, ServerProcess]]:
    """Start all of them, and return those that got ready; `stack` ends them."""
    began = time.monotonic()
    found = []
    for layout, server in list(_started(stack, layouts, make, errors)):
        try:
            server.wait_ready(max(1.0, began + ready_s - time.monotonic()))
            found.append((layout, server))
            say(f"{layout.name}: ready after {time.monotonic() - began:.0f} s")
        except FAILURES as error:
            _note(errors, layout, error)
            # It would still load and capture while others are measured.
            server.stop()
    return found


def _started(
    stack: ExitStack, layouts: Sequence[Layout], make: Make, errors: list[str]
) -> Iterator[tuple[Layout, ServerProcess]]:
    for layout in layouts:
        say(f"{layout.name}: starting its server")
        try:
            yield layout, stack.enter_context(make(layout))
        except FAILURES as error:
            _note(errors, layout, error)


def _note(errors: list[str], layout: Layout, error: Exception) -> None:
    errors.append(f"{layout.name}: {error}")
    say(errors[-1])
