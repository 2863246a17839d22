"""What `eval_draft.py` makes of the servers' replies: accepted drafts, table, judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from accuracy_report import FIRST
from decode_layouts import Layout
from decode_report import markdown
from real_text import Ids

# Tokens of a verification if drafts are clearly accepted; without any it is 1.
LEAST = 1.2
# Relative difference of mean accepted lengths in 16 bit, where near ties of drafts part.
CLOSE = 0.01


class Drafted(NamedTuple):
    """A reply, its verifications, and SGLang's `spec_accept_length`."""

    ids: Ids
    verifications: int
    accept_length: float


def accepted(replies: Sequence[Drafted]) -> float:
    """Tokens of a verification. The prefill gives the first token of each reply.

    1 without speculation, where each decode step gives one.
    """
    steps = sum(one.verifications for one in replies)
    tokens = sum(len(one.ids) - 1 for one in replies)
    return tokens / steps if steps else 1.0


def equal_ids(got: Sequence[Drafted], want: Sequence[Drafted]) -> int:
    return sum(a.ids == b.ids for a, b in zip(got, want, strict=True))


def table(found: Mapping[str, Sequence[Drafted]]) -> str:
    """A row for each server, compared with the first."""
    head = "server|equal replies|verifications|tokens of a verification"
    rows = [f"{head}|mean spec_accept_length".split("|")]
    for name, replies in found.items():
        equal = equal_ids(replies, found[FIRST])
        steps = sum(one.verifications for one in replies)
        own = mean(one.accept_length for one in replies)
        cells = (f"{steps}", f"{accepted(replies):.4f}", f"{own:.4f}")
        rows.append([name, f"{equal} of {len(replies)}", *cells])
    return markdown(rows)


def faults(
    found: Mapping[str, Sequence[Drafted]],
    layouts: Sequence[Layout],
    wanted: Sequence[int] | None,
) -> list[str]:
    """Say which servers speak otherwise, accept little, or not what they should.

    `wanted` are the verifications of each reply. Without them (16 bit) replies may part, and
    the mean accepted length is compared with plain TP's.
    """
    served = [layout for layout in layouts if layout.name in found]
    plain = [accepted(found[one.name]) for one in served if one.dcp_size == 1]
    errors = []
    for layout in served:
        replies = found[layout.name]
        own = [f"{accepted(replies):.3f} tokens of a verification"]
        own *= accepted(replies) < LEAST
        if wanted is None:
            own += _unlike_plain(accepted(replies), plain)
        else:
            own += _unlike_torch(replies, found[FIRST], wanted)
        errors += [f"{layout.name}: {line}" for line in own]
    return errors


def _unlike_plain(got: float, plain: Sequence[float]) -> list[str]:
    return [
        f"{got:.4f} tokens of a verification, plain TP {want:.4f}"
        for want in plain
        if abs(got - want) > CLOSE * want
    ]


def _unlike_torch(
    got: Sequence[Drafted], first: Sequence[Drafted], wanted: Sequence[int]
) -> list[str]:
    equal = equal_ids(got, first)
    counts = [one.verifications for one in got]
    right = sum(a == b for a, b in zip(counts, wanted, strict=True))
    lines = [f"{equal} of {len(got)} replies are equal"] * (equal < len(got))
    if right < len(got):
        lines.append(
            f"{sum(counts)} verifications, by torch {sum(wanted)}; "
            f"equal for {right} of {len(got)} replies"
        )
    return lines
