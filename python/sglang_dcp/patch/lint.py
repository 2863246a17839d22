"""The command `patch lint`: headers, series against files, budget, hashes, README."""

from __future__ import annotations

from pathlib import Path

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import folder_of, load_series, read_series, versions
from sglang_dcp.patch.readme import render_readme

# A hook is one call. Code that needs more lines belongs in sglang_dcp.
MAX_ADDED_LINES = 15
_NO_PATCHES = {"series"}


def lint() -> int:
    """Check every series. Return 0 if nothing is wrong."""
    found = [fault for version in versions() for fault in faults(version)]
    readme = folder_of("README.md")
    if not found and _text(readme) != render_readme():
        found.append(f"{readme} is stale; run patch export")
    for fault in found:
        print(fault)
    print(f"{len(versions())} series, {len(found)} faults")
    return 1 if found else 0


def faults(version: str) -> list[str]:
    """Return one line for each fault of the series for a version of SGLang."""
    folder = folder_of(version)
    try:
        load_series(version)
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
    """Count the lines that a patch adds to SGLang."""
    diff = patch[patch.index(b"\ndiff --git ") :].split(b"\n")
    return sum(line[:1] == b"+" and line[:6] != b"+++ b/" for line in diff)


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
