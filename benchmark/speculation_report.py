"""Tables of `bench_speculation.py`, from its CSV.

python benchmark/speculation_report.py results.csv [more.csv ...]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csv_rows import read_rows
from decode_quantization import PLAIN
from decode_report import markdown
from prefill_report import p95
from speculation_replies import Reply, time_together


class Row(NamedTuple):
    """One line of the CSV. Without a time the size did not fit the KV pool.

    Attributes
    ----------
    draft, steps : who drafts (`-` without speculation), and steps of the draft
    accepted : tokens that each verification gave, the target's own among them
    prefixes : 1 if all requests share their pages, else as many as requests
    step_ms : per decode step or verification: median over requests and repeats of the mean
    step_p95_ms : of single steps, over all requests and repeats
    token_ms : `step_ms` / `accepted`
    cached : the fewest tokens that a request got from the cache
    weights : format of the weights; earlier files do not say it
    """

    model: str
    tp: int
    gpu: str
    layout: str
    attention: str
    draft: str
    steps: int
    accepted: int
    context: int
    batch: int
    prefixes: int
    step_ms: float
    step_p95_ms: float
    token_ms: float
    repeats: int
    cached: int
    weights: str = PLAIN


FIELDS = Row._fields
# What the lines of a table do not say.
_SHARED = ("model", "tp", "gpu", "weights")


def summary(
    who: tuple[str, int, str, str, str],
    how: tuple[str, int, int],
    size: tuple[int, int, int],
    repeats: Sequence[Sequence[Reply]],
    weights: str = PLAIN,
) -> Row:
    """Sum up the repeats of one size; without any, the size did not fit."""
    if not repeats:
        return Row(*who, *how, *size, 0.0, 0.0, 0.0, 0, 0, weights)
    timed = [time_together(replies) for replies in repeats]
    token = statistics.median(mean for one in timed for mean in one.means)
    late = p95([gap for one in timed for gap in one.gaps])
    accepted = how[-1]
    milliseconds = (token * accepted, late * accepted, token)
    step, step_p95, per_token = (round(seconds * 1e3, 4) for seconds in milliseconds)
    cached = min(reply.cached for replies in repeats for reply in replies)
    counts = (len(repeats), cached)
    return Row(*who, *how, *size, step, step_p95, per_token, *counts, weights)


def read(file: Path) -> list[Row]:
    return read_rows(file, Row)


def differences(rows: Sequence[Row]) -> list[str]:
    """Name the columns in which rows differ that one table cannot hold."""
    found: dict[str, set[Any]] = {
        name: {getattr(row, name) for row in rows} for name in _SHARED
    }
    found["draft"] = {row.draft for row in rows if row.steps}
    # A batch of one has one prefix either way.
    found["prefixes"] = {row.prefixes > 1 for row in rows if row.batch > 1}
    return [name for name, values in found.items() if len(values) > 1]


def step_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each size, draft and accepted length; a column for each layout.

    A cell has milliseconds per step (95th percentile), milliseconds per token, and the step
    as a multiple of the first layout's.
    """
    layouts = list(dict.fromkeys(row.layout for row in rows))
    found = {(_line(row), row.layout): row for row in rows}
    heads = ["context", "batch", "draft steps", "accepted"]
    table = [heads + [f"{layout}: step (p95), token" for layout in layouts]]
    for line in sorted(dict.fromkeys(map(_line, rows))):
        first = found.get((line, layouts[0]))
        cells = [_cell(found.get((line, layout)), first) for layout in layouts]
        context, batch, steps, accepted = line
        table.append([f"{context:,}", str(batch), str(steps), str(accepted), *cells])
    return table


def _line(row: Row) -> tuple[int, int, int, int]:
    return row.context, row.batch, row.steps, row.accepted


def _cell(row: Row | None, first: Row | None) -> str:
    if row is None or not row.step_ms:
        return "does not fit" if row else "-"
    text = f"{row.step_ms:.2f} ({row.step_p95_ms:.2f}), {row.token_ms:.2f}"
    if first is None or first is row or not first.step_ms:
        return text
    return f"{text}, x {row.step_ms / first.step_ms:.2f}"


def break_even_table(rows: Sequence[Row]) -> list[list[str]]:
    """From how many accepted tokens on a layout's speculation is faster than its own step.

    A verification takes as long whatever is accepted, so time per token is its time over
    the accepted length.
    """
    layouts = list(dict.fromkeys(row.layout for row in rows))
    without = {
        (row.layout, row.context, row.batch): row.step_ms
        for row in rows
        if not row.steps and row.step_ms
    }
    found = {
        (row.context, row.batch, row.steps, row.layout): row.step_ms
        for row in rows
        if row.steps and row.step_ms
    }
    table = [["context", "batch", "draft steps", *layouts]]
    for context, batch, steps in sorted({key[:3] for key in found}):
        cells = []
        for layout in layouts:
            own = without.get((layout, context, batch))
            step = found.get((context, batch, steps, layout))
            cells.append(f"{step / own:.2f}" if own and step else "-")
        table.append([f"{context:,}", str(batch), str(steps), *cells])
    return table


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(__doc__)
        return 2
    rows = [row for name in argv for row in read(Path(name))]
    if differ := differences(rows):
        print(f"these files differ in {', '.join(differ)}: print them apart")
        return 2
    print(tables(rows))
    return 0


def tables(rows: Sequence[Row]) -> str:
    return (
        "Milliseconds:\n\n"
        + markdown(step_table(rows))
        + "\n\nAccepted tokens from which speculation is faster than the layout without:"
        + "\n\n"
        + markdown(break_even_table(rows))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
