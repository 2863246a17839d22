"""What became of each hook's target, and of each file, from one release to another."""

from __future__ import annotations

import ast
from difflib import SequenceMatcher
from enum import Enum
from pathlib import PurePosixPath
from typing import NamedTuple, Optional

from sglang_dcp.hooks.compare.source import (
    Definition,
    find,
    homes,
    locate,
    registered,
    split_path,
)
from sglang_dcp.hooks.compare.tree import SourceTree


class Verdict(Enum):
    """What became of a target or a file."""

    UNCHANGED = "unchanged"
    BODY = "body changed"
    SIGNATURE = "signature changed"
    MOVED = "moved"
    GONE = "gone"
    # A hook may put something where SGLang had nothing.
    ADDED = "added"
    ABSENT = "absent in both"
    FILE_CHANGED = "file changed"
    FILE_UNCHANGED = "file unchanged"
    CHANGED = "changed"


# A release, and a definition in it.
_Side = tuple[SourceTree, Definition]


class Finding(NamedTuple):
    """A verdict, and what a reader needs to know beside it."""

    verdict: Verdict
    detail: str = ""


def compare_target(old: SourceTree, new: SourceTree, target: str) -> Finding:
    """Return what became of a hook's target, which is `path` or `path[key]`."""
    path, _, key = target.rstrip("]").partition("[")
    before, after = locate(old, path), locate(new, path)
    if before is None:
        return Finding(Verdict.ADDED if after else Verdict.ABSENT)
    if after is None:
        return _missing(old, new, path, before)
    sides = (old, before), (new, after)
    return _compare_entry(*sides, path, key) if key else _compare(*sides)


def _compare(old: _Side, new: _Side) -> Finding:
    before, after = old[1], new[1]
    notes = [] if after.file == before.file else [f"{after.file} defines it now"]
    was, now = before.signature(), after.signature()
    if was != now:
        return Finding(Verdict.SIGNATURE, "; ".join([f"{was} -> {now}", *notes]))
    if before.content() != after.content():
        return Finding(Verdict.BODY, "; ".join(notes))
    if helpers := _changed_helpers(old, new):
        notes.append(f"but not {', '.join(helpers)}, which it calls")
    return Finding(Verdict.UNCHANGED, "; ".join(notes))


def _changed_helpers(old: _Side, new: _Side) -> list[str]:
    """Name the functions that an unchanged target calls and that changed."""
    called = {
        call.func.id
        for node in new[1].nodes
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    found = []
    for name in sorted(called):
        before, after = (find(tree, home.file, [name]) for tree, home in (old, new))
        if before is not None and after is not None:
            if before.content() != after.content():
                found.append(name)
    return found


def _compare_entry(old: _Side, new: _Side, path: str, key: str) -> Finding:
    name = path.rpartition(".")[2]
    before, after = registered(*old, name, key), registered(*new, name, key)
    if before is not None and after is not None:
        return _compare((old[0], before), (new[0], after))
    if before is not None:
        return Finding(Verdict.GONE, f"{new[1].file} does not register it")
    if after is not None:
        return Finding(Verdict.ADDED, f"{after.file} registers it now")
    was, now = (tree.text(home.file) for tree, home in (old, new))
    return Finding(
        Verdict.FILE_UNCHANGED if was == now else Verdict.FILE_CHANGED,
        "no registration of the key found in either",
    )


def _missing(
    old: SourceTree, new: SourceTree, path: str, before: Definition
) -> Finding:
    """Look for a target that is gone from its place under the same name elsewhere."""
    file, names = split_path(old, path)
    # A class that is gone takes its methods with it, so look for the class.
    depths = range(1, len(names))
    depth = next((n for n in depths if not _has(new, file, names[:n])), len(names))
    name, rest = names[depth - 1], names[depth:]
    places = []
    for home, dotted in homes(new, name):
        # What was there before is another thing, unless the target was imported from it.
        is_origin = home == before.file != file
        if is_origin or not _has(old, home, dotted.split(".")):
            if _has(new, home, [*dotted.split("."), *rest]):
                places.append(f"{home}:{'.'.join([dotted, *rest])}")
    if len(places) == 1:
        return Finding(Verdict.MOVED, f"to {places[0]}")
    if 1 < len(places) <= 3:
        return Finding(Verdict.GONE, f"the name is new in {', '.join(places)}")
    return Finding(Verdict.GONE)


def _has(tree: SourceTree, file: Optional[str], names: list[str]) -> bool:
    return file in tree.files and find(tree, str(file), names) is not None


def compare_file(old: SourceTree, new: SourceTree, file: str) -> Finding:
    """Return what became of a file, and how many lines it gained and lost."""
    if file not in old.files:
        return Finding(Verdict.ADDED if file in new.files else Verdict.ABSENT)
    if file in new.files:
        lines = _changed_lines(old.text(file), new.text(file))
        return Finding(Verdict.CHANGED, lines) if lines else Finding(Verdict.UNCHANGED)
    name = PurePosixPath(file).name
    places = [f for f in new.files - old.files if PurePosixPath(f).name == name]
    if len(places) != 1:
        return Finding(Verdict.GONE)
    lines = _changed_lines(old.text(file), new.text(places[0]))
    return Finding(Verdict.MOVED, f"to {places[0]} {lines}".rstrip())


def _changed_lines(before: str, after: str) -> str:
    """Return `+added -removed`, or nothing for equal texts."""
    if before == after:
        return ""
    was, now = before.split("\n"), after.split("\n")
    blocks = SequenceMatcher(None, was, now, autojunk=False).get_matching_blocks()
    kept = sum(block.size for block in blocks)
    return f"+{len(now) - kept} -{len(was) - kept}"
