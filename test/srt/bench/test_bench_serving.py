"""`bench_serving.py` with stand-ins for its servers and for the load generator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import bench_serving
from decode_layouts import Layout
from helpers.server_stand_in import Server

WORDS = "--device cuda --tp 2 --layouts 2:a2a 2:ag_rs --concurrency 4 --input-lens 8"
WORDS += " --start-together"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What happened, in order. The server with `a2a` never gets ready."""
    found: list[str] = []

    def make_server(options: Any, layout: Layout, model: Path) -> Server:
        log = tmp_path / f"{layout.name}.log"
        return Server(layout.name, found, layout.comm == "a2a", log)

    def load(options: Any, url: str, *more: object) -> dict[str, Any]:
        found.append(f"load {url}")
        return {
            "completed": 8,
            "duration": 1.0,
            "server_info": {},
            "total_output_tokens": 8 * options.output_len,
        }

    monkeypatch.setattr(bench_serving, "make_server", make_server)
    monkeypatch.setattr(bench_serving, "load", load)
    return found


def test_a_server_that_fails_leaves_the_gpus_to_the_others(
    events: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    options = bench_serving.parse([str(path), *WORDS.split()])
    errors: list[str] = []
    layouts = [options.plain, *options.layouts]
    results = bench_serving.serve(options, layouts, tmp_path / "model", [], errors)
    assert [result["layout"] for result in results] == ["tp", "2:ag_rs"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == results and not any(r["failed"] or r["short"] for r in results)
    assert errors == ["2:a2a: not ready"]
    assert events == [
        *("start tp", "start 2:a2a", "start 2:ag_rs", "stop 2:a2a"),
        *("load tp", "load 2:ag_rs"),
        *("end 2:ag_rs", "end 2:a2a", "end tp"),
    ]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
