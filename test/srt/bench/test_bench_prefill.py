"""What `bench_prefill.py` sends and sums up, without a server."""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import bench_prefill
from bench_prefill import Size, groups, measure_group, parse
from decode_layouts import Layout
from helpers.server_stand_in import Server
from live_client import Answer, Client
from prefill_report import FIELDS, p95, ratio_table, read, summary

WHO = ("Llama-3.1-8B", 2, "a GPU", "tp", "fa3")


class Recorder(Client):
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


def options_of(folder: Path, more: str = "") -> argparse.Namespace:
    words = f"{folder}/x.csv --device cpu --tp 2 --layouts 2:a2a --model Llama-3.1-8B"
    return parse([*words.split(), *more.split()])


def test_turns_share_their_prefixes_and_nothing_more(tmp_path: Path) -> None:
    client = Recorder()
    turns = [Size(50, 3, 4), Size(50, 1, 4), Size(50, 900, 4)]
    options = options_of(tmp_path, "--repeats 2")
    found = dict(measure_group(client, turns, options, room=300))
    assert found[turns[0]] == [Answer(53, 50)] * 8
    assert found[turns[1]] == [Answer(51, 50)] * 8
    # More than there is room for.
    assert found[turns[2]] == []
    # Four prefixes, then one warm-up and two counted repeats of each turn that fits.
    assert [len(group) for group in client.groups] == [1] * 4 + [4] * 6
    prefixes = {tuple(ids) for [ids] in client.groups[:4]}
    sent = [ids for group in client.groups[4:] for ids in group]
    assert {tuple(ids[:50]) for ids in sent} == prefixes and len(prefixes) == 4
    assert len({tuple(ids[50:]) for ids in sent[:12]}) == 12


def test_prefixes_that_no_turn_fits_are_not_prefilled(tmp_path: Path) -> None:
    client = Recorder()
    [(_, answers)] = measure_group(client, [Size(50, 1, 4)], options_of(tmp_path), 207)
    assert answers == [] and client.groups == []


def test_whole_prompts_find_nothing_and_turns_find_the_last(tmp_path: Path) -> None:
    client = Recorder()
    words = "--prefixes 50 60 --repeats 1 --whole-repeats 2"
    options = options_of(tmp_path, words)
    first = measure_group(client, [Size(0, 50, 1), Size(50, 3, 1)], options, 54)
    assert [answers for _, answers in first] == [[Answer(50, 0)] * 2, [Answer(53, 50)]]
    # One warm-up and two prompts, then one warm-up and one turn; no prefix beside them.
    assert [len(ids) for [ids] in client.groups] == [50] * 3 + [53] * 2
    later = dict(measure_group(client, [Size(0, 60, 1)], options, 61))
    assert later == {(0, 60, 1): [Answer(60, 0)] * 2}
    # The kernels are warm.
    assert len(client.groups) == 5 + 2


def test_every_prefix_comes_whole_first(tmp_path: Path) -> None:
    words = "--prefixes 64 128 --turns 1 8 --batches 4 1"
    found = list(groups(options_of(tmp_path, words)))
    assert found[:2] == [
        [(0, 64, 1), (64, 1, 1), (64, 8, 1)],
        [(64, 1, 4), (64, 8, 4)],
    ]
    assert found[2][0] == (0, 128, 1) and len(found) == 4
    without = list(groups(options_of(tmp_path, f"{words} --whole-repeats 0")))
    turns = [[size for size in group if size.prefix] for group in found]
    assert without == turns
    for words in ("--prefixes 64 --batches 4 --turns 1", "--prefixes 64 --turns"):
        assert next(groups(options_of(tmp_path, words))) == [(0, 64, 1)]
    for wrong in ("--repeats 0", "--whole-repeats -1"):
        with pytest.raises(SystemExit):
            options_of(tmp_path, wrong)


def test_table_compares_with_plain_tp(tmp_path: Path) -> None:
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


def test_peaks_are_of_gpus_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options_of(tmp_path, "--peak-memory")
    assert "--peak-memory" in capsys.readouterr().err


def test_doors_are_opened_in_second_servers(tmp_path: Path) -> None:
    options = options_of(tmp_path, "--doors short_prefill_door prefill_groups_door")
    options.folder = tmp_path
    seen: dict[str, dict[str, str]] = {}

    def started(options: Any, layout: Layout, *rest: Any) -> None:
        seen[layout.name] = rest[-1]

    with mock.patch("bench_prefill.new_server", started):
        for layout in (options.plain, *options.layouts):
            bench_prefill.make_server(options, layout, tmp_path)
    assert list(seen) == ["tp", "2:a2a", "2:a2a+doors"]
    assert not seen["tp"] and not seen["2:a2a"]
    env = seen["2:a2a+doors"]
    folder = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    source = (folder / "open_doors.py").read_text()
    for door in options.doors:
        assert f"from helpers.{door} import open_door" in source


def test_percentile_is_a_value_that_was_seen() -> None:
    assert p95(range(1, 101)) == 95
    assert p95([7.0]) == 7.0


def test_ratios_are_to_plain_tp_of_the_same_backend() -> None:
    layouts = {
        **{"tp": ("fa3", 1.0), "2:a2a": ("fa3", 2.0)},
        **{
            "2:a2a@flashinfer": ("flashinfer", 3.0),
            "tp@flashinfer": ("flashinfer", 6.0),
        },
        "2:a2a@triton": ("triton", 4.0),
    }
    rows = [
        summary((*WHO[:3], name, attention), (0, 64, 1), [seconds], 0)
        for name, (attention, seconds) in layouts.items()
    ]
    head, cells, plain = ratio_table(rows)
    assert head[3:] == list(layouts)
    assert cells[3:] == [
        "1.000 (1.000)",
        "2.000 (2.000), x 2.00",
        "3.000 (3.000), x 0.50",
        "6.000 (6.000)",
        # There is no plain TP on triton.
        "4.000 (4.000), x 4.00",
    ]
    assert plain == ["ratio to", "", "", "tp", "tp", *["tp@flashinfer"] * 2, "tp"]


def test_files_without_the_format_of_weights_are_read(tmp_path: Path) -> None:
    row = summary(WHO, (0, 64, 1), [2.0], 0)
    file = tmp_path / "x.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([FIELDS[:-1], row[:-1]])
    assert read(file) == [row]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What happened, in order. The server with `ag_rs` never gets ready."""
    found: list[str] = []

    def make_server(options: Any, layout: Layout, model: Path) -> Server:
        return Server(layout.name, found, layout.comm == "ag_rs", tmp_path / "log")

    monkeypatch.setattr(bench_prefill, "make_server", make_server)
    return found


def test_a_prefix_that_was_not_cached_is_an_error(
    servers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def rows(options: Any, layout: Any, url: str) -> Any:
        who = (*WHO[:3], layout.name, "fa3")
        yield summary(who, (4096, 1, 1), [1.0], 4096 if layout.name == "tp" else 0)

    monkeypatch.setattr(bench_prefill, "rows_of", rows)
    words = f"{tmp_path}/x.csv --device cpu --tp 2 --layouts 2:a2a --prefixes 4096"
    assert bench_prefill.main([*words.split(), "--model", "Llama-3.1-8B"]) == 1
    assert "2:a2a: 0 of 4096 tokens came from the cache" in capsys.readouterr().out


def test_rows_are_in_the_file_before_the_next_is_measured(
    servers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.csv"
    seen: list[int] = []

    def rows(options: Any, layout: Any, url: str) -> Any:
        for prefix in (64, 128):
            seen.append(len(read(file)))
            yield summary((*WHO[:3], url, "fa3"), (0, prefix, 1), [1.0], 0)

    monkeypatch.setattr(bench_prefill, "rows_of", rows)
    words = "--device cpu --tp 2 --layouts 2:a2a 2:ag_rs --start-together"
    options = parse([str(file), *words.split(), "--model", "Llama-3.1-8B"])
    assert bench_prefill.record(options, tmp_path) == ["2:ag_rs: not ready"]
    assert seen == [0, 1, 2, 3]
    assert [row.layout for row in read(file)] == ["tp"] * 2 + ["2:a2a"] * 2
    assert servers[:3] == ["start tp", "start 2:a2a", "start 2:ag_rs"]
