"""What `eval_accuracy.py` makes of the servers' answers: measures, table, judgement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from decode_layouts import Layout
from decode_report import markdown
from real_text import Ids

# The server that all others are compared with: plain tp 1.
FIRST = "tp1"
# Of plain TP's mean distance from tp 1, as in the GPU tests.
MARGIN = 1.5
NO_DISTANCE = 1e-4


@dataclass(frozen=True)
class Answers:
    """What one server said: log-probabilities of the tokens that it read, and replies."""

    read: list[float]
    replies: list[Ids]


def perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-mean(logprobs))


def mean_difference(got: Sequence[float], want: Sequence[float]) -> float:
    """Mean of |d log-probability|; NaN if one is. ValueError for unequal lengths."""
    return mean(abs(a - b) for a, b in zip(got, want, strict=True))


def equal_replies(got: Sequence[Ids], want: Sequence[Ids]) -> int:
    return sum(a == b for a, b in zip(got, want, strict=True))


def table(found: dict[str, Answers]) -> str:
    """A row for each server, compared with the first."""
    first = found[FIRST]
    head = "server|perplexity|mean difference from tp 1|equal replies"
    rows = [head.split("|")]
    for name, answers in found.items():
        gap = mean_difference(answers.read, first.read)
        equal = equal_replies(answers.replies, first.replies)
        cells = (f"{perplexity(answers.read):.4f}", f"{gap:.3g}")
        rows.append([name, *cells, f"{equal} of {len(first.replies)}"])
    return markdown(rows)


def faults(found: dict[str, Answers], layouts: Sequence[Layout]) -> list[str]:
    """DCP servers that are further from tp 1 than plain TP is, times a margin."""
    first = found[FIRST].read
    gaps = {name: mean_difference(a.read, first) for name, a in found.items()}
    plain = [gaps[x.name] for x in layouts if x.dcp_size == 1 and x.name in gaps]
    bound = max([NO_DISTANCE, *(MARGIN * gap for gap in plain)])
    return [
        f"{layout.name}: its mean difference {gaps[layout.name]:.3g} is not below {bound:.3g}"
        for layout in layouts
        # Written so that a NaN is a fault too.
        if layout.name in gaps and not gaps[layout.name] < bound
    ]
