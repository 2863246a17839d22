"""`patch lint`: headers, series against files, budget, hashes, README."""

from __future__ import annotations

from pathlib import Path

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import (
    NAME,
    folder_of,
    load_series,
    read_series,
    versions,
)
from sglang_dcp.patch.readme import render_readme

# A seam is a call; what needs more belongs into sglang_dcp.
MAX_ADDED_LINES = 15
_NO_PATCHES = {"series", NAME}


def lint() -> int:
    """Check every series; 0 where nothing is wrong."""
    found = [fault for version in versions() for fault in faults(folder_of(version))]
    readme = folder_of("README.md")
    if not found and _text(readme) != render_readme():
        found.append(f"{readme} is stale; run patch export")
    for fault in found:
        print(fault)
    print(f"{len(versions())} series, {len(found)} faults")
    return 1 if found else 0


def faults(folder: Path) -> list[str]:
    """One line for each thing that is wrong with the series in `folder`."""
    try:
        load_series(folder)
        names = read_series(folder)
    except PatchError as error:
        return [str(error)]
    strays = {path.name for path in folder.iterdir()} - set(names) - _NO_PATCHES
    found = [f"{folder / stray} is not in the series" for stray in sorted(strays)]
    for name in names:
        patch = (folder / name).read_bytes()
        try:
            read_header(name, patch)
        except PatchError as error:
            found.append(str(error))
        if (count := added_lines(patch)) > MAX_ADDED_LINES:
            found.append(
                f"{name} adds {count} lines, more than {MAX_ADDED_LINES}; move logic "
                "into sglang_dcp, or split it"
            )
    return found


def added_lines(patch: bytes) -> int:
    """Lines that a patch adds to SGLang."""
    diff = patch[patch.index(b"\ndiff --git ") :].split(b"\n")
    return sum(line[:1] == b"+" and line[:6] != b"+++ b/" for line in diff)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
