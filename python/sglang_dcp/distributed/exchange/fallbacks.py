"""Counts of the calls that did not use the comm backend asked for."""

from __future__ import annotations

from collections import Counter
from typing import Callable, Optional

# Takes a reason and by how much its count grew.
Observer = Callable[[str, int], None]


class Fallbacks:
    """Counts fallbacks by reason, and tells one observer of each.

    A call is one exchange of one layer. The calls of a captured graph count once, when
    they are captured, because a replay runs no Python.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._observer: Optional[Observer] = None

    @property
    def counts(self) -> dict[str, int]:
        """Return how often each reason occurred."""
        return dict(self._counts)

    def add(self, reason: str) -> None:
        """Count one fallback."""
        self._counts[reason] += 1
        if self._observer is not None:
            self._observer(reason, 1)

    def observe(self, observer: Observer) -> None:
        """Tell `observer` all counts until now, and from now on each fallback."""
        self._observer = observer
        for reason, count in self._counts.items():
            observer(reason, count)
