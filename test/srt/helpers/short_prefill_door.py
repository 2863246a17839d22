"""A door in what keeps short prefills from being decode steps.

DCP makes them only where GPU servers have shown it right and fast: on `fa3`, in the model's
dtype. The plugin of a server opens that door for the rest, in its processes only. The rule by
lengths stays. On a GPU a step runs only where it has a graph, and on a CPU, which has none,
without one.

Its servers log each step. DCP itself logs the first one only, and that may be the warm-up.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import torch

OPENED = ("fa3", "flashinfer", "triton", "torch_native")
LINE = "short prefill as a step of"
CHAIN = ", a chain"


def steps_in(log: str) -> list[int]:
    """Return the rows of each step that rank 0 logged."""
    return _rows_in(log, f"{LINE} (\\d+) rows")


def chains_in(log: str) -> list[int]:
    """Return the rows of each step of these that was a chain."""
    return _rows_in(log, f"{LINE} (\\d+) rows{CHAIN}$")


def _rows_in(log: str, line: str) -> list[int]:
    of_first = re.findall(rf"^\[[^]]*TP0[^]]*\] {line}", log, re.M)
    return [int(rows) for rows in of_first]


def open_door() -> None:
    """Let servers of this process run short prefills as decode steps."""
    from sglang_dcp.layers import short_prefill

    step_of = short_prefill.ShortPrefill.step_of

    def logged(short: Any, batch: Any) -> Any:
        step = step_of(short, batch)
        if step is not None:
            rows, chain = step.batch.batch_size, step.chains is not None
            short_prefill.logger.info("%s %d rows%s", LINE, rows, CHAIN * chain)
        return step

    setattr(short_prefill.ShortPrefill, "step_of", logged)
    os.environ.pop(short_prefill.SWITCH, None)
    served = frozenset(itertools.product(OPENED, short_prefill.Stored))
    short_prefill.SERVED = served  # type: ignore[misc]
    if not torch.cuda.is_available():
        short_prefill.MOST_EAGER_ROWS = 64  # type: ignore[misc]
