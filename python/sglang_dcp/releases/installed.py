"""The version of the installed SGLang, and ranges of versions."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

# Stands for a version that nothing tells. No release has it, so it is an unknown one.
NO_VERSION = "(no version)"
_ASSIGNED = re.compile(r"^__version__\b.*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


@functools.cache
def sglang_version() -> str:
    """Return the version of the installed SGLang, or `NO_VERSION`.

    A source tree on `PYTHONPATH` may have no metadata. Then its files tell the version.
    They are read and not imported, because plugins load before SGLang is ready.
    """
    try:
        return version("sglang")
    except PackageNotFoundError:
        return _version_in_source() or NO_VERSION


def _version_in_source() -> Optional[str]:
    spec = importlib.util.find_spec("sglang")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for name in ("_version.py", "version.py"):
            file = Path(folder) / name
            found = _ASSIGNED.search(file.read_text()) if file.is_file() else None
            if found:
                return found[1]
    return None


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
