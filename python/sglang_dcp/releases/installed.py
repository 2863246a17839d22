"""The version of the installed SGLang, and ranges of versions."""

from __future__ import annotations

import functools
import re
from importlib.metadata import version
from typing import Optional


@functools.cache
def sglang_version() -> str:
    """Return the version of the installed SGLang."""
    return version("sglang")


def by_number(release: str) -> tuple[int, ...]:
    """Return the parts of a version as numbers, so that versions compare in order."""
    parts = (re.match(r"\d+", part) for part in release.split("."))
    return tuple(int(part[0]) if part else 0 for part in parts)


def in_range(release: str, since: Optional[str], until: Optional[str]) -> bool:
    """Whether `since` <= `release` < `until`. None leaves that side open."""
    number = by_number(release)
    return (since is None or by_number(since) <= number) and (
        until is None or number < by_number(until)
    )
