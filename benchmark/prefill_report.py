"""Table and plot of `bench_prefill.py`, from its CSV.

    python benchmark/prefill_report.py results.csv [plot.png]

The plot has a panel for each number of new tokens and of requests at once, and a line for
each layout. It needs matplotlib: `pip install '.[bench]'`.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csv_rows import read_rows
from decode_quantization import PLAIN
from decode_report import markdown

WHOLE = "whole"


class Row(NamedTuple):
    """One line of the CSV. Without a time the size did not fit the KV pool.

    Attributes
    ----------
    prefix, new, batch : cached tokens, new tokens, and requests at once
    median_s, p95_s : seconds to the first token, over all requests of all repeats
    requests : how many requests these are of
    cached : the fewest tokens that a request got from the cache
    weights : format of the weights; earlier files do not say it
    peak_bytes : what the largest forward took on each rank, a number for each
    told_bytes : what attention may take at most, by the server's estimate at its start
    """

    model: str
    tp: int
    gpu: str
    layout: str
    attention: str
    prefix: int
    new: int
    batch: int
    median_s: float
    p95_s: float
    requests: int
    cached: int
    weights: str = PLAIN
    peak_bytes: str = ""
    told_bytes: int = 0


FIELDS = Row._fields


def summary(
    who: tuple[str, int, str, str, str],
    size: tuple[int, int, int],
    seconds: Sequence[float],
    cached: int,
    weights: str = PLAIN,
) -> Row:
    """Sum up the requests of one size; without any, the size did not fit."""
    if not seconds:
        return Row(*who, *size, 0.0, 0.0, 0, cached, weights)
    times = (round(statistics.median(seconds), 5), round(p95(seconds), 5))
    return Row(*who, *size, *times, len(seconds), cached, weights)


def p95(values: Sequence[float]) -> float:
    """Return the smallest value that 95 % of all do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def read(file: Path) -> list[Row]:
    return read_rows(file, Row)


def ratio_table(rows: Sequence[Row]) -> list[list[str]]:
    """Median and 95th percentile of each layout, and the ratio to its plain layout."""
    plain = plain_layouts(rows)
    found = {(row.layout, row.prefix, row.new, row.batch): row for row in rows}
    table = [["prefix", "new", "at once", *plain]]
    for size in dict.fromkeys((row.prefix, row.new, row.batch) for row in rows):
        cells = [
            _cell(found.get((layout, *size)), found.get((other, *size)))
            for layout, other in plain.items()
        ]
        table.append([f"{number:,}" for number in size] + cells)
    if len(set(plain.values())) > 1:
        # Else a reader could take all ratios for ones to the first column.
        table.append(["ratio to", "", "", *plain.values()])
    return table


def memory_table(rows: Sequence[Row]) -> list[list[str]]:
    """GB that the largest forward took: on the GPU with most, and the range of all GPUs.

    SGLang's own activations count. The last line is the estimate for attention alone.
    """
    layouts = list(dict.fromkeys(row.layout for row in rows))
    found = {(row.layout, row.prefix, row.new, row.batch): row for row in rows}
    table = [["prefix", "new", "at once", *layouts]]
    for size in dict.fromkeys((row.prefix, row.new, row.batch) for row in rows):
        cells = [_peaks_cell(found.get((layout, *size))) for layout in layouts]
        table.append([f"{number:,}" for number in size] + cells)
    told = {row.layout: row.told_bytes for row in rows}
    estimates = [f"{told[layout] / 1e9:.2f}" for layout in layouts]
    return [*table, ["attention, told", "", "", *estimates]]


def _peaks_cell(row: Row | None) -> str:
    if row is None or not row.peak_bytes:
        return "-"
    peaks = [int(number) / 1e9 for number in row.peak_bytes.split()]
    return f"{max(peaks):.2f} ({min(peaks):.2f} to {max(peaks):.2f})"


def plain_layouts(rows: Sequence[Row]) -> dict[str, str]:
    """For each layout the one without DCP to compare it with, itself where it is one.

    That is the one of the same attention backend where there is one, else the first, else
    the first of all layouts.
    """
    attention = {row.layout: row.attention for row in rows}
    plain = [layout for layout in attention if layout.partition("@")[0] == "tp"]
    first = next(iter(plain or attention), "")
    by_backend = {attention[layout]: layout for layout in reversed(plain)}
    return {
        layout: layout if layout in plain else by_backend.get(backend, first)
        for layout, backend in attention.items()
    }


def _cell(row: Row | None, plain: Row | None) -> str:
    if row is None or not row.median_s:
        return "does not fit" if row else "-"
    text = f"{row.median_s:.3f} ({row.p95_s:.3f})"
    if plain is None or plain is row or not plain.median_s:
        return text
    return f"{text}, x {row.median_s / plain.median_s:.2f}"


def plot(rows: Sequence[Row], png: Path) -> None:
    """Draw `rows` into `png`: seconds over the prefix, or over the whole prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    kinds = list(dict.fromkeys(map(_kind, rows)))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(4.4 * len(kinds), 4.2), squeeze=False
    )
    for panel, kind in zip(panels[0], kinds):
        _panel(panel, [row for row in rows if _kind(row) == kind])
        panel.set_title(kind)
    panels[0][0].set_ylabel("seconds to the first token (median)")
    panels[0][0].legend(frameon=False)
    first = rows[0]
    figure.suptitle(
        f"{first.model} dimensions, {first.weights}, {first.tp} x {first.gpu}"
    )
    figure.tight_layout()
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def _kind(row: Row) -> str:
    if not row.prefix:
        return f"{WHOLE} prompt"
    return f"{row.batch} x {row.new} tokens on a prefix"


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    for layout in dict.fromkeys(row.layout for row in rows):
        of_layout = [row for row in rows if row.layout == layout and row.median_s]
        lengths = [row.prefix or row.new for row in of_layout]
        panel.plot(lengths, [row.median_s for row in of_layout], "o-", label=layout)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens")
    panel.grid(alpha=0.3)


def main(argv: Sequence[str]) -> int:
    if not 1 <= len(argv) <= 2:
        print(__doc__)
        return 2
    file = Path(argv[0])
    rows = read(file)
    print(markdown(ratio_table(rows)))
    if any(row.peak_bytes for row in rows):
        print("\n" + markdown(memory_table(rows)))
    if len(argv) == 2:
        plot(rows, Path(argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
