"""Runs the engines of `bench_decode.py` one after the other and writes their rows."""

from __future__ import annotations

import argparse
import csv
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from decode_engine import WARM_STEPS, Row
from decode_layouts import Layout
from decode_models import write_model
from decode_peer import run_upstream
from decode_profile import Profile
from decode_quantization import config_entries
from decode_ranks import Message, run_layout

BEGAN = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {text}", flush=True)


def _stamp(options: argparse.Namespace) -> dict[str, Any]:
    on_gpu = options.device == "cuda"
    return {
        "model": options.model,
        "tp": options.tp,
        "page": options.page_size,
        "kv_dtype": options.kv_cache_dtype,
        "weights": options.weights,
        "gpu": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "steps": options.steps,
    }


class Outcome(NamedTuple):
    """What a run leaves beside its CSV: profiles, names of layouts that failed or were refused."""

    profiles: list[Profile]
    failed: list[str]


def record(options: argparse.Namespace, file: Path) -> Outcome:
    """Run plain tensor parallelism and every layout; rows go into `file` as they come."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    stamp = _stamp(options)
    outcome = Outcome([], [])
    length = max(options.contexts) + WARM_STEPS + options.steps + 1
    with tempfile.TemporaryDirectory() as folder, file.open("w", newline="") as lines:
        more = config_entries(options.quantization)
        model = write_model(Path(folder), options.model, length, more)
        table = csv.writer(lines)
        table.writerow((*stamp, *Layout._fields, *Row._fields[1:]))
        for layout in (options.plain, *options.layouts):
            say(f"{layout.name}: starting")
            try:
                for message in _messages(options, layout, model):
                    if isinstance(message, Row):
                        table.writerow((*stamp.values(), *layout, *message[1:]))
                        lines.flush()
                    elif isinstance(message, Profile):
                        outcome.profiles.append(message)
            except ValueError as error:
                # Not at module level: ranks import this file, without the package too.
                from sglang_dcp.config import DcpConfigError

                if not isinstance(error, DcpConfigError):
                    raise
                say(f"{layout.name}: refused: {error}")
                outcome.failed.append(layout.name)
            except RuntimeError as error:
                # The other layouts are worth their time all the same.
                say(f"{layout.name}: FAILED: {error}")
                outcome.failed.append(layout.name)
    return outcome


def _messages(
    options: argparse.Namespace, layout: Layout, model: Path
) -> Iterator[Message]:
    run = run_upstream if layout.is_upstream else run_layout
    with closing(run(options, layout, model)) as messages:
        for message in messages:
            say(f"{layout.name}: {message}")
            yield message
