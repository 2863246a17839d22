"""A combination that is refused: its flag, its value, the reason and the way out.

What is refused: `server_refusals`, `backend_refusals`, `model_refusals`.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

from sglang_dcp.config import DcpConfigError


class Refusal(NamedTuple):
    """One combination that is refused.

    `value` returns what to print after the flag, or None where the combination is fine.
    """

    flag: str
    value: Callable[[Any], Optional[Any]]
    reason: str
    way_out: str


def check_table(refusals: tuple[Refusal, ...], subject: Any) -> None:
    """Raise for the first entry of `refusals` that speaks for `subject`."""
    for refusal in refusals:
        value = refusal.value(subject)
        if value is not None:
            refuse(refusal.flag, value, refusal.reason, refusal.way_out)


def refuse(flag: str, value: Any, reason: str, way_out: str) -> None:
    """Raise `DcpConfigError` with flag, value, reason and way out."""
    shown = "" if value is True else f" {value}"
    raise DcpConfigError(f"{flag}{shown} does not work with DCP: {reason}; {way_out}")
