"""The short tables of `bench_decode.py`, from the rows of its CSV.

python benchmark/decode_report.py results.csv    # the table of decode steps again
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from decode_models import DIRECT, PREFILLED

Record = dict[str, str]
# Beyond it a directly filled pool would not stand for a prefilled one.
FILL_TOLERANCE = 0.03
# Two starts of one server differ by about as much even where their repeats agree.
OFF_FLOOR = 0.01


def read(file: Path) -> list[Record]:
    """The lines of a CSV of `bench_decode.py`, of earlier versions too."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "| " + " | ".join(map(str.rjust, row, widths)) + " |"  # type: ignore[arg-type]
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join((lines[0], rule, *lines[1:]))


def unique(records: Iterable[Record], *names: str) -> list[tuple[str, ...]]:
    """The values of these columns in the order in which they first come."""
    return list(dict.fromkeys(tuple(r[name] for name in names) for r in records))


def step_table(records: Sequence[Record]) -> list[list[str]]:
    """Median (95th percentile) of a decode step in ms, a column a layout."""
    layouts = [name for (name,) in unique(records, "name")]
    table = [["context", "batch", *layouts]]
    by_size = {(r["context"], r["batch"], r["name"]): r for r in records}
    for context, batch in unique(records, "context", "batch"):
        found = [by_size.get((context, batch, name)) for name in layouts]
        times = [float(r["median_ms"]) for r in found if r and r["median_ms"]]
        fastest = min(times, default=None)
        table.append([context, batch, *(_cell(r, fastest) for r in found)])
    pools = {r["name"]: int(r["pool_tokens"]) for r in records}
    table.append(["KV tokens", "", *(f"{pools[name]:,}" for name in layouts)])
    held = {r["name"]: int(r["weight_bytes"]) for r in records if "weight_bytes" in r}
    if held:
        # Of one rank; earlier files do not say it.
        cells = [f"{held[name] / 1e9:.3f}" for name in layouts]
        table.append(["weights, GB", "", *cells])
    return table


def _cell(record: Record | None, fastest: float | None) -> str:
    if record is None or not record["median_ms"]:
        return "does not fit" if record else "-"
    median, p95 = float(record["median_ms"]), float(record["p95_ms"])
    mark = "**" if median == fastest else ""
    return f"{mark}{median:.2f}{mark} ({p95:.2f})"


def fill_table(records: Sequence[Record]) -> tuple[list[list[str]], bool]:
    """Directly filled against prefilled pools; true if all agree within the tolerance."""
    head = "layout|context|batch|direct ms|p95|prefilled ms|p95|direct / prefilled"
    table, good = [head.split("|")], all(r["median_ms"] for r in records)
    records = [r for r in records if r["median_ms"]]
    for size in unique(records, "name", "context", "batch"):
        of_size = [r for r in records if (r["name"], r["context"], r["batch"]) == size]
        direct, prefilled = (
            [r for r in of_size if r["fill"] == fill] for fill in (DIRECT, PREFILLED)
        )
        ratio = _median(direct) / _median(prefilled)
        good &= abs(ratio - 1) <= FILL_TOLERANCE
        cells = [*_cells(direct), *_cells(prefilled), f"{ratio:.4f}"]
        table.append([*size, *cells])
    return table, good


def off_table(records: Sequence[Record]) -> tuple[list[list[str]], bool]:
    """With against without the package; true if no pair differs by more than noise."""
    head = "context|batch|with ms|p95|without ms|p95|with / without|noise"
    table, good = [head.split("|")], all(r["median_ms"] for r in records)
    records = [r for r in records if r["median_ms"]]
    for size in unique(records, "context", "batch"):
        of_size = [r for r in records if (r["context"], r["batch"]) == size]
        sides = [[r for r in of_size if r["package"] == side] for side in ("in", "out")]
        noise = max(OFF_FLOOR, *map(_spread, sides))
        ratio = _median(sides[0]) / _median(sides[1])
        good &= abs(ratio - 1) <= noise
        cells = [cell for side in sides for cell in _cells(side)]
        table.append([*size, *cells, f"{ratio:.4f}", f"{100 * noise:.1f} %"])
    return table, good


def _values(records: Sequence[Record], column: str) -> list[float]:
    return [float(r[column]) for r in records]


def _median(records: Sequence[Record], column: str = "median_ms") -> float:
    return statistics.median(_values(records, column))


def _spread(records: Sequence[Record]) -> float:
    """How far the medians of repeats are apart, as a share of their median."""
    medians = _values(records, "median_ms")
    return (max(medians) - min(medians)) / statistics.median(medians)


def _cells(records: Sequence[Record]) -> list[str]:
    columns: tuple[Callable[[], float], ...] = (
        lambda: _median(records),
        lambda: _median(records, "p95_ms"),
    )
    return [f"{value():.3f}" for value in columns]


if __name__ == "__main__":
    print(markdown(step_table(read(Path(sys.argv[1])))))
