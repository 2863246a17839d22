"""The rule for an unsupported case: its flag, its value, the reason and a hint.

The cases themselves are in `server`, `backends` and `models`.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, NoReturn, Optional

from sglang_dcp.config import DcpConfigError


class Unsupported(NamedTuple):
    """One case that DCP does not serve.

    `value` returns what to print after the flag, or None if the case does not apply.
    """

    flag: str
    value: Callable[[Any], Optional[Any]]
    reason: str
    hint: str


def check_rules(rules: tuple[Unsupported, ...], subject: Any) -> None:
    """Raise `DcpConfigError` for the first of `rules` that applies to `subject`."""
    for rule in rules:
        value = rule.value(subject)
        if value is not None:
            raise_unsupported(rule.flag, value, rule.reason, rule.hint)


def raise_unsupported(flag: str, value: Any, reason: str, hint: str) -> NoReturn:
    """Raise `DcpConfigError` with flag, value, reason and hint. True is not printed."""
    shown = "" if value is True else f" {value}"
    raise DcpConfigError(f"{flag}{shown} does not work with DCP: {reason}; {hint}")
