"""The commands `patch status`, `check`, `apply` and `revert`."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.swap import Change, leftovers, locked, replace_all
from sglang_dcp.patch.tree import (
    PATCHED,
    PRISTINE,
    Tree,
    find_package,
    read_tree,
    refuse_unknown,
)


def status(target: Optional[Path]) -> int:
    """Print the state of every touched file. Exit with 0 if all have the same known state."""
    tree = read_tree(find_package(target))
    for name, state in tree.states.items():
        print(f"{state:<9} {name}")
    for path in leftovers(tree.root, tree.series.files):
        print(f"left over {path.relative_to(tree.root)} (apply and revert remove it)")
    print(f"{tree.root}: {_summary(tree)}")
    return 0 if _summary(tree) in (PATCHED, PRISTINE) else 1


def _summary(tree: Tree) -> str:
    states = tree.states.values()
    if len(set(states)) == 1:
        return next(iter(states))
    counts = {state: list(states).count(state) for state in sorted(set(states))}
    parts = ", ".join(f"{count} {state}" for state, count in counts.items())
    if set(counts) == {PATCHED, PRISTINE}:
        return f"half patched ({parts}); run patch apply, or patch revert"
    return parts


def check(target: Optional[Path]) -> int:
    """Do what `apply` and `revert` do, but write nothing."""
    tree = read_tree(find_package(target))
    refuse_unknown(tree)
    _changes(tree, PRISTINE, tree.series.patch)
    _changes(tree, PATCHED, tree.series.unpatch)
    print(
        f"{tree.root}: {_summary(tree)}; the series fits sglang {tree.series.version}"
    )
    return 0


def apply(target: Optional[Path]) -> int:
    """Patch every pristine file. It also finishes a run that was killed."""
    return _move(target, PRISTINE, PATCHED)


def revert(target: Optional[Path]) -> int:
    """Restore every byte of SGLang. It also undoes a run that was killed."""
    return _move(target, PATCHED, PRISTINE)


def _move(target: Optional[Path], source: str, goal: str) -> int:
    root = find_package(target)
    with locked(root):
        tree = read_tree(root)
        refuse_unknown(tree)
        make = tree.series.patch if goal == PATCHED else tree.series.unpatch
        changes = _changes(tree, source, make)
        _remove_leftovers(tree)
        replace_all(root, changes)
        after = read_tree(root)
    if after.named(goal) != list(after.series.files):
        raise PatchError(f"{root} was changed by others meanwhile: {_summary(after)}")
    print(f"{root}: {goal}, {len(changes)} of {len(tree.series.files)} files changed")
    return 0


def _changes(
    tree: Tree, source: str, make: Callable[[str, bytes], bytes]
) -> dict[str, Change]:
    """Compute the changes of all files in state `source`. Nothing is written yet."""
    return {
        name: Change(tree.contents[name], make(name, tree.contents[name]))
        for name in tree.named(source)
    }


def _remove_leftovers(tree: Tree) -> None:
    for path in leftovers(tree.root, tree.series.files):
        try:
            path.unlink()
        except OSError as error:
            raise PatchError(
                f"{path} is left of a run that was killed and cannot be removed "
                f"({error.strerror}); remove it as its owner"
            ) from error
