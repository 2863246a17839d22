"""The report of `compare`: hooks, files, server arguments and pins, one line for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from sglang_dcp.hooks.compare.metadata import pins, server_arguments
from sglang_dcp.hooks.compare.source import locate, split_path
from sglang_dcp.hooks.compare.tree import PACKAGE, SourceTree
from sglang_dcp.hooks.compare.verdicts import (
    Finding,
    Verdict,
    compare_file,
    compare_target,
)
from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, RELIES_ON, Hook, rows_of
from sglang_dcp.releases.installed import in_range

# What a hook on such a target does, or that it can be installed at all, is no longer sure.
_NEEDS_WORK = {Verdict.SIGNATURE, Verdict.MOVED, Verdict.GONE, Verdict.ADDED}


def print_report(old: SourceTree, new: SourceTree) -> int:
    """Print everything. Return 1 if a hook of the old release needs work, else 0."""
    hooks = rows_of(HOOKS + CPU_HOOKS, old.version)
    findings = {hook: compare_target(old, new, hook.target) for hook in hooks}
    files = {row.path for row in rows_of(RELIES_ON, old.version)}
    files |= set(target_files(old, hooks))
    sections = {
        "Hooks": hook_lines(findings, new.version),
        "Files with hooks, or that our code relies on": file_lines(old, new, files),
        "Server arguments": argument_lines(old, new),
        "Pins": pin_lines(old, new),
    }
    # Whole texts first: wrong input prints one line, and no half report.
    texts = ["\n".join(["", title, *lines]) for title, lines in sections.items()]
    print(f"{PACKAGE} {old.version} -> {new.version}", *texts, sep="\n")
    return int(any(found.verdict in _NEEDS_WORK for found in findings.values()))


def target_files(tree: SourceTree, hooks: Iterable[Hook]) -> Iterator[str]:
    """Yield the files of each hook's target: of its module, and of its definition."""
    for hook in hooks:
        path = hook.target.partition("[")[0]
        module, found = split_path(tree, path)[0], locate(tree, path)
        if module is not None:
            yield module
        if found is not None:
            yield found.file


def hook_lines(findings: dict[Hook, Finding], new_version: str) -> Iterator[str]:
    """Yield a line for each hook, and how many have each verdict."""
    for hook, found in findings.items():
        notes = [found.detail] if found.detail else []
        if not in_range(new_version, hook.since, hook.until):
            notes.append(f"the table has no such hook for {new_version}")
        target = hook.target.removeprefix(f"{PACKAGE}.")
        line = f"{found.verdict.value:<17}  {hook.name:<25}  {target}"
        yield ": ".join([line, *filter(None, ["; ".join(notes)])])
    counts = Counter(found.verdict for found in findings.values())
    parts = [f"{counts[found]} {found.value}" for found in Verdict if found in counts]
    yield f"{len(findings)} hooks: {', '.join(parts)}"


def file_lines(old: SourceTree, new: SourceTree, files: set[str]) -> Iterator[str]:
    """Yield a line for each file of the old release."""
    for file in sorted(files):
        found = compare_file(old, new, file)
        yield f"{found.verdict.value:<9}  {file} {found.detail}".rstrip()


def argument_lines(old: SourceTree, new: SourceTree) -> Iterator[str]:
    """Yield the server arguments that only one release has, or with another default."""
    before, after = server_arguments(old), server_arguments(new)
    for name in sorted(before.keys() - after.keys()):
        yield f"gone     {name}"
    for name in sorted(after.keys() - before.keys()):
        yield f"new      {name} = {after[name]}"
    shared = sorted(before.keys() & after.keys())
    for name in shared:
        if before[name] != after[name]:
            yield f"default  {name} = {before[name]} -> {after[name]}"
    yield f"{len(before)} -> {len(after)} arguments"


def pin_lines(old: SourceTree, new: SourceTree) -> Iterator[str]:
    """Yield a line for each pinned package."""
    if not (old.requires and new.requires):
        yield "no metadata in or beside one of them"
        return
    before, after = pins(old), pins(new)
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name, "no pin"), after.get(name, "no pin")
        yield f"{name} {was}" + ("" if was == now else f" -> {now}")
