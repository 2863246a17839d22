"""What `eval_draft.py` makes of the servers' replies: accepted drafts, table, judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
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
# Part of the replies that must be plain TP's in 16 bit, where near ties of words part too.
EQUAL = 0.25


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


def equal_replies(
    got: Sequence[Drafted], want: Sequence[Drafted]
) -> tuple[list[Drafted], list[Drafted]]:
    """Return the replies that both servers gave, as each of them drafted for it."""
    both = [pair for pair in zip(got, want, strict=True) if pair[0].ids == pair[1].ids]
    return [own for own, _ in both], [other for _, other in both]


def table(
    found: Mapping[str, Sequence[Drafted]], plain: Sequence[Drafted] | None = None
) -> str:
    """A row for each server, compared with the first, and with replies of plain TP."""
    head = "server|equal replies|verifications|tokens of a verification"
    head += "|mean spec_accept_length"
    if plain:
        head += "|of replies equal to plain TP's, and plain TP's"
    rows = [head.split("|")]
    for name, replies in found.items():
        equal = len(equal_replies(replies, found[FIRST])[0])
        steps = sum(one.verifications for one in replies)
        own = mean(one.accept_length for one in replies)
        cells = [f"{steps}", f"{accepted(replies):.4f}", f"{own:.4f}"]
        if plain:
            same, theirs = equal_replies(replies, plain)
            lengths = f": {accepted(same):.4f}, {accepted(theirs):.4f}" if same else ""
            cells.append(f"{len(same)}{lengths}")
        rows.append([name, f"{equal} of {len(replies)}", *cells])
    return markdown(rows)


def faults(
    found: Mapping[str, Sequence[Drafted]],
    layouts: Sequence[Layout],
    wanted: Sequence[int] | None,
) -> list[str]:
    """Say which servers speak otherwise, accept little, or not what they should.

    `wanted` are the verifications of each reply. Without them (16 bit) replies may part. Of
    those that are plain TP's, the mean accepted length is compared with plain TP's. Drafts
    of other words are right at other places, so other replies tell nothing.
    """
    served = [layout for layout in layouts if layout.name in found]
    plain = [found[one.name] for one in served if one.dcp_size == 1]
    errors = []
    for layout in served:
        replies = found[layout.name]
        own = [f"{accepted(replies):.3f} tokens of a verification"]
        own *= accepted(replies) < LEAST
        if wanted is None:
            own += chain.from_iterable(_unlike_plain(replies, one) for one in plain)
        else:
            own += _unlike_torch(replies, found[FIRST], wanted)
        errors += [f"{layout.name}: {line}" for line in own]
    return errors


def _unlike_plain(got: Sequence[Drafted], plain: Sequence[Drafted]) -> list[str]:
    own, other = equal_replies(got, plain)
    if len(own) < EQUAL * len(got):
        return [f"{len(own)} of {len(got)} replies are plain TP's, too few to compare"]
    found, want = accepted(own), accepted(other)
    if abs(found - want) <= CLOSE * want:
        return []
    return [
        f"{found:.4f} tokens of a verification in replies that are plain TP's, "
        f"plain TP {want:.4f}"
    ]


def _unlike_torch(
    got: Sequence[Drafted], first: Sequence[Drafted], wanted: Sequence[int]
) -> list[str]:
    equal = len(equal_replies(got, first)[0])
    counts = [one.verifications for one in got]
    right = sum(a == b for a, b in zip(counts, wanted, strict=True))
    lines = [f"{equal} of {len(got)} replies are equal"] * (equal < len(got))
    if right < len(got):
        lines.append(
            f"{sum(counts)} verifications, by torch {sum(wanted)}; "
            f"equal for {right} of {len(got)} replies"
        )
    return lines
