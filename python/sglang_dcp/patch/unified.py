"""Reads patches that `git format-patch` wrote, and applies them to bytes exactly.

`git apply` skips every file below another repository and reports success. `patch` accepts
shifted lines. Here a hunk fits at its line or not at all.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sglang_dcp.patch.error import PatchError

_FILE = re.compile(rb"diff --git a/(\S+) b/(\S+)")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Hunk(NamedTuple):
    """The lines `old`, from line number `at` on, become `new`. Numbers begin at 1."""

    at: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    new_at: int

    def reversed(self) -> Hunk:
        return Hunk(self.new_at, self.new, self.old, self.at)


class FileDiff(NamedTuple):
    """The changes of one patch to one file, with the file's path in a checkout."""

    path: str
    hunks: tuple[Hunk, ...]

    def reversed(self) -> FileDiff:
        return FileDiff(self.path, tuple(hunk.reversed() for hunk in self.hunks))


def read_patch(name: str, patch: bytes) -> list[FileDiff]:
    """Return the changes of patch `name`, file by file.

    Raises
    ------
    PatchError
        The patch has more than changed lines of existing files, or wrong line counts.
    """
    lines = _lines(patch)
    starts = [i for i, line in enumerate(lines) if line.startswith(b"diff --git ")]
    if not starts:
        raise PatchError(f"{name} changes no file; export it again")
    ends = [*starts[1:], len(lines)]
    return [_read_file(name, lines[a:b]) for a, b in zip(starts, ends)]


def _lines(text: bytes) -> list[bytes]:
    """Split into lines as git does: a carriage return does not end a line."""
    return re.findall(rb"[^\n]*\n|[^\n]+", text)


def _read_file(name: str, lines: list[bytes]) -> FileDiff:
    match = _FILE.match(lines[0])
    path = match.group(1) if match else b"?"
    wanted = (b"index ", b"--- a/" + path, b"+++ b/" + path, b"@@ ")
    if match is None or match.group(2) != path or len(lines) < 5:
        raise PatchError(f"{name}: cannot read {lines[0]!r}; export it again")
    for line, start in zip(lines[1:5], wanted):
        if not line.startswith(start):
            raise PatchError(
                f"{name}: {path.decode()} is more than changed lines ({line!r}); "
                "a patch neither makes, moves nor removes files"
            )
    return FileDiff(path.decode(), _read_hunks(f"{name}: {path.decode()}", lines[4:]))


def _read_hunks(where: str, lines: list[bytes]) -> tuple[Hunk, ...]:
    hunks: list[Hunk] = []
    while lines:
        match = _HUNK.match(lines[0])
        if match is None:
            raise PatchError(f"{where}: no hunk at {lines[0]!r}; export it again")
        at, old_count, new_at, new_count = (
            1 if group is None else int(group) for group in match.groups()
        )
        old: list[bytes] = []
        new: list[bytes] = []
        position = 1
        while len(old) < old_count or len(new) < new_count:
            if position == len(lines) or lines[position][:1] not in (b" ", b"-", b"+"):
                raise PatchError(f"{where}: hunk at line {at} is cut; export it again")
            mark, text = lines[position][:1], lines[position][1:]
            if mark != b"+":
                old.append(text)
            if mark != b"-":
                new.append(text)
            position += 1
        if (len(old), len(new)) != (old_count, new_count) or not old or not new:
            raise PatchError(f"{where}: hunk at line {at} miscounts; export it again")
        hunks.append(Hunk(at, tuple(old), tuple(new), new_at))
        lines = lines[position:]
    return tuple(hunks)


def apply_hunks(text: bytes, diff: FileDiff) -> bytes:
    """Return `text` with every hunk applied at its line.

    Raises
    ------
    PatchError
        The old lines of a hunk are not at its line.
    """
    lines = _lines(text)
    result: list[bytes] = []
    done = 0
    for hunk in diff.hunks:
        start = hunk.at - 1
        found = tuple(lines[start : start + len(hunk.old)])
        if start < done or found != hunk.old:
            raise PatchError(f"{diff.path} has other lines at {hunk.at} than the patch")
        result += [*lines[done:start], *hunk.new]
        done = start + len(hunk.old)
    return b"".join(result + lines[done:])
