"""The order in which `live_servers.py` starts, measures and ends servers."""

from __future__ import annotations

import sys
from argparse import Namespace
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest

from decode_layouts import Layout
from helpers.server_stand_in import Server
from live_servers import groups_of, log_beside, measure_servers, new_server

NAMES = ("tp", "2:a2a", "2:ag_rs")
LAYOUTS = [Layout.parse(name) for name in NAMES]


def run(together: bool, broken: str = "", ends: str = "", cut: str = "") -> Any:
    """Events and lines of three servers: one `broken`, one that `ends`, one `cut` off."""
    events: list[str] = []

    def make(layout: Layout) -> Any:
        return Server(layout.name, events, layout.name == broken, Path())

    def measure(layout: Layout, server: Any) -> None:
        events.append(f"measure {layout.name}")
        if layout.name == cut:
            raise IncompleteRead(b"")
        if layout.name == ends:
            server.returncode = -9

    groups = groups_of(Namespace(start_together=together), LAYOUTS)
    return events, measure_servers(groups, 1.0, make, measure)


def test_together_all_are_up_while_each_is_measured() -> None:
    events, errors = run(together=True)
    steps = [f"{what} {name}" for what in ("start", "measure") for name in NAMES]
    assert events == [*steps, *(f"end {name}" for name in reversed(NAMES))]
    assert errors == []


def test_alone_each_ends_before_the_next_starts() -> None:
    events, errors = run(together=False)
    whats = ("start", "measure", "end")
    assert events == [f"{what} {name}" for name in NAMES for what in whats]
    assert errors == []


@pytest.mark.parametrize("together", (True, False))
def test_one_that_never_gets_ready_is_stopped_at_once(together: bool) -> None:
    events, errors = run(together, broken="2:a2a")
    assert errors == ["2:a2a: not ready"]
    measured = [event for event in events if event.startswith("measure")]
    assert measured == ["measure tp", "measure 2:ag_rs"]
    # It must not load and capture beside the one that is measured next.
    assert events.index("stop 2:a2a") < events.index("measure 2:ag_rs")


@pytest.mark.parametrize("together", (True, False))
def test_one_that_ends_or_is_lost_leaves_a_line(together: bool) -> None:
    """A server that ends within a streamed reply cuts a chunk of it off."""
    events, errors = run(together, ends="tp", cut="2:a2a")
    assert errors == [
        "tp: the server ended:\nits log",
        "2:a2a: IncompleteRead(0 bytes read)",
    ]
    assert "measure 2:ag_rs" in events


def test_a_layout_has_its_own_backend_log_and_plugins(tmp_path: Path) -> None:
    import bench_prefill

    words = f"{tmp_path}/x.csv --device cuda --tp 2 --model Qwen3-30B-A3B/4"
    layouts = "--layouts 2:symm_a2a:q@flashinfer upstream:2"
    options = bench_prefill.parse([*words.split(), *layouts.split()])
    ours, upstream = (
        new_server(
            options,
            layout,
            tmp_path,
            log_beside(options.csv, layout.name),
            ["--more"],
            {"A": "b"},
        )
        for layout in options.layouts
    )
    for server, backend in ((ours, "flashinfer"), (upstream, "triton")):
        at = server.command.index("--attention-backend")
        assert server.command[at + 1] == backend and "--more" in server.command
        assert server._env["A"] == "b"
    assert ours.log_path == tmp_path / "x-2-symm_a2a-q@flashinfer.log"
    assert upstream._env["SGLANG_PLUGINS"] == options.off_plugins
    assert ours._env.get("SGLANG_PLUGINS") != options.off_plugins


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
