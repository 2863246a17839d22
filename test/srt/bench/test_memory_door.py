"""What a forward takes on a GPU, as the ranks of a benchmark's servers note it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import memory_door
from memory_door import FOLDER, around_forward, open_door, take_peaks
from prefill_report import Row, memory_table, read

GB = 10**9


class Allocator:
    """torch's counts of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = self.rank = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.rank)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)

    def _reset(self) -> None:
        self.peak = self.held

    def forward(self, runner: Any, taken: int, *, kept: int = 0) -> str:
        self.peak = max(self.peak, self.held + taken)
        self.held += kept
        return f"logits of {runner}"


def test_each_rank_leaves_its_largest_forward(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    gpu = Allocator(monkeypatch)
    gpu.held = gpu.peak = 900
    assert around_forward(gpu.forward, "it", 40, kept=7) == "logits of it"
    around_forward(gpu.forward, "it", 70)
    around_forward(gpu.forward, "it", 50)
    gpu.rank = 1
    around_forward(gpu.forward, "it", 60)
    assert take_peaks(tmp_path) == [70, 60]
    # Of the next size alone.
    around_forward(gpu.forward, "it", 5)
    assert take_peaks(tmp_path) == [5]
    assert take_peaks(tmp_path) == [] == list(tmp_path.iterdir())


def test_the_plugin_hooks_every_forward(tmp_path: Path) -> None:
    """SGLang finds it, and what it hooks exists."""
    env = open_door(tmp_path / "door")
    assert env[FOLDER] == str(tmp_path / "door")
    assert str(tmp_path / "door") in env["PYTHONPATH"].split(os.pathsep)
    script = (
        "from importlib.metadata import entry_points\n"
        "from unittest import mock\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "[point] = [p for p in entry_points(group='sglang.srt.plugins')"
        " if p.name == 'memory_door']\n"
        "with mock.patch.object(HookRegistry, 'register') as register:\n"
        "    point.load()()\n"
        "target, hook, kind = register.call_args.args\n"
        "print(target, hook.__name__, kind.name)\n"
    )
    paths = [env["PYTHONPATH"], *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    target, name, kind = done.stdout.split()[-3:]
    assert (name, kind) == (memory_door.around_forward.__name__, "AROUND")
    module, _, owner = target.rpartition(".")[0].rpartition(".")
    found = find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0], *module.split(".")[1:])
    text = source.with_suffix(".py").read_text()
    assert f"class {owner}" in text and "    def forward(" in text


def test_table_names_the_gpu_with_most_and_the_estimate(tmp_path: Path) -> None:
    known = ("M", 2, "cpu", "tp", "fa3", 0, 8, 1, 0.1, 0.1, 3, 0)
    rows = [
        Row(*known, peak_bytes=f"{2 * GB} {GB}"),
        Row(*known)._replace(layout="2:a2a", told_bytes=3 * GB),
    ]
    assert memory_table(rows) == [
        ["prefix", "new", "at once", "tp", "2:a2a"],
        ["0", "8", "1", "2.00 (1.00 to 2.00)", "-"],
        ["attention, told", "", "", "0.00", "3.00"],
    ]
    file = tmp_path / "rows.csv"
    lines = [",".join(Row._fields), *(",".join(map(str, row)) for row in rows)]
    file.write_text("\n".join(lines))
    assert read(file) == rows


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
