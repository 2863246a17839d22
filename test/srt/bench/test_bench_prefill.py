"""What `bench_prefill.py` sends and sums up, without a server."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import bench_prefill
from bench_prefill import Answer, Asked, Size, measure, parse, sizes
from prefill_report import FIELDS, p95, ratio_table, read, summary

WHO = ("Llama-3.1-8B", 2, "a GPU", "tp", "fa3")


class Recorder(Asked):
    """Answers at once, from a cache of what was sent before."""

    def __init__(self) -> None:
        super().__init__("", 1000)
        self.groups: list[list[list[int]]] = []
        self.seen: list[list[int]] = []

    def flush(self) -> None:
        self.seen.clear()

    def together(self, prompts: Any) -> list[Answer]:
        self.groups.append(prompts)
        found = [Answer(len(ids), self._cached(ids)) for ids in prompts]
        self.seen += prompts
        return found

    def _cached(self, ids: list[int]) -> int:
        return max((len(old) for old in self.seen if ids[: len(old)] == old), default=0)


def test_turns_find_their_prefix_and_nothing_more() -> None:
    asked = Recorder()
    answers = measure(asked, Size(50, 3, 4), 2)
    assert answers == [Answer(53, 50)] * 8
    # Four prefixes, then one warm-up and two counted repeats.
    assert [len(group) for group in asked.groups] == [1] * 4 + [4] * 3
    tails = {tuple(ids[50:]) for group in asked.groups[4:] for ids in group}
    assert len(tails) == 12


def test_whole_prompts_find_nothing() -> None:
    answers = measure(Recorder(), Size(0, 50, 1), 3)
    assert answers == [Answer(50, 0)] * 3


def test_every_prefix_comes_whole_first(tmp_path: Path) -> None:
    names = f"{tmp_path}/x.csv --device cpu --tp 2 --layouts 2:a2a"
    more = "--prefixes 64 128 --turns 1 8 --batches 1 4 --model Llama-3.1-8B"
    options = parse([*names.split(), *more.split()])
    first, second = sizes(options)
    assert first[0] == (0, 64, 1) and second[0] == (0, 128, 1)
    assert set(first[1:]) == {(64, n, b) for n in (1, 8) for b in (1, 4)}
    with pytest.raises(SystemExit):
        parse([*names.split(), "--repeats", "0"])


def test_table_compares_with_the_first_layout(tmp_path: Path) -> None:
    rows = [
        summary(WHO, (0, 64, 1), [2.0, 1.0, 3.0], 0),
        summary(WHO, (64, 1, 1), [], 0),
        summary((*WHO[:3], "2:a2a", "fa3"), (0, 64, 1), [3.0], 0),
        summary((*WHO[:3], "2:a2a", "fa3"), (64, 1, 1), [0.5], 64),
    ]
    file = tmp_path / "x.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([FIELDS, *rows])
    assert read(file) == rows
    assert ratio_table(rows) == [
        ["prefix", "new", "at once", "tp", "2:a2a"],
        ["0", "64", "1", "2.000 (3.000)", "3.000 (3.000), x 1.50"],
        ["64", "1", "1", "does not fit", "0.500 (0.500)"],
    ]


def test_percentile_is_a_value_that_was_seen() -> None:
    assert p95(range(1, 101)) == 95
    assert p95([7.0]) == 7.0


def test_a_prefix_that_was_not_cached_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(options: Any, layout: Any, model: Path) -> Any:
        who = (*WHO[:3], layout.name, "fa3")
        yield summary(who, (4096, 1, 1), [1.0], 4096 if layout.name == "tp" else 0)

    monkeypatch.setattr(bench_prefill, "rows_of", rows)
    words = f"{tmp_path}/x.csv --device cpu --tp 2 --layouts 2:a2a --prefixes 4096"
    assert bench_prefill.main([*words.split(), "--model", "Llama-3.1-8B"]) == 1
    assert "2:a2a: 0 of 4096 tokens came from the cache" in capsys.readouterr().out
