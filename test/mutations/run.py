"""The mutation check: the code is broken on purpose, and a named test must notice.

    python test/mutations/run.py                      # all mutations
    python test/mutations/run.py owner-rule-shifted   # one of them
    python test/mutations/run.py --jobs 2

Each `NAME.patch` in this folder is one mutation: a header and a unified diff. Paths are
relative to the repository.

    Why: A rank takes the slots of its neighbour.
    Caught-by: test/srt/unit/test_layout.py::test_each_slot_is_written_by_one_rank
    Caught-by: test/srt/ranks/test_attention.py -k "prefix and a2a"

    --- a/python/sglang_dcp/ops/layout.py
    +++ b/python/sglang_dcp/ops/layout.py
    @@ -52 +52 @@ def local_slots
    -    owned = slots % dcp_size == dcp_rank
    +    owned = (slots + 1) % dcp_size == dcp_rank

`git diff -U0` writes such a diff. A hunk fits where all its old lines follow each other,
which must be at exactly one place of the file. Its line numbers count for nothing, so a
mutation outlives changes elsewhere in the file. There is no fuzz.

The check works on copies of the repository in a temporary folder. First, all named tests
must pass without a mutation. Then each mutation gets a copy of its own, and each of its
`Caught-by` lines must make pytest fail. The exit status is 0 if all mutations are caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[1]
# What the tests need. Tests find the benchmarks and the patch series beside the package.
COPIED = ("python/sglang_dcp", "patches", "test/srt", "benchmark", "setup.cfg")
# Of a test that is named once. A mutation may make it hang.
TIMEOUT_S = 600

CAUGHT, SURVIVED = "caught", "SURVIVED"
DOES_NOT_APPLY, DID_NOT_RUN = "does not apply", "tests did not run"

_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_FIELD = re.compile(r"(Why|Caught-by): (.*\S)")


class BadPatch(ValueError):
    """A patch whose header or diff cannot be read."""


class DoesNotApply(ValueError):
    """A patch whose old lines are not at exactly one place of a file."""


class Hunk(NamedTuple):
    """Lines `old` of a file become `new`. `context` of the old lines stay."""

    path: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    context: int


class Mutation(NamedTuple):
    """One patch.

    Attributes
    ----------
    why : str
        What goes wrong.
    caught_by : tuple of str
        Pytest node ids, or `path -k expression`. Each must fail.
    """

    name: str
    why: str
    caught_by: tuple[str, ...]
    hunks: tuple[Hunk, ...]


class Outcome(NamedTuple):
    """One pytest run: its exit status, how many tests passed and failed, what it printed."""

    code: Optional[int]
    passed: int
    failed: int
    printed: str


class Verdict(NamedTuple):
    """What became of a mutation, and the reason if it was not caught."""

    mutation: Mutation
    result: str
    reason: str = ""

    def __str__(self) -> str:
        line = f"{self.result:<17} {self.mutation.name}"
        return f"{line}: {self.reason}" if self.reason else line


def names() -> list[str]:
    """Names of all mutations."""
    return sorted(path.stem for path in FOLDER.glob("*.patch"))


def read_mutation(name: str) -> Mutation:
    """Read mutation `name` of this folder."""
    return parse(name, (FOLDER / f"{name}.patch").read_text())


def parse(name: str, text: str) -> Mutation:
    """Make a mutation of the text of a patch.

    Raises
    ------
    BadPatch
        A field is missing or occurs too often, or the diff is malformed.
    """
    header, mark, diff = text.partition("\n--- a/")
    if not mark:
        raise BadPatch(f"{name}: there is no diff")
    fields: dict[str, list[str]] = {"Why": [], "Caught-by": []}
    for line in filter(None, header.splitlines()):
        match = _FIELD.fullmatch(line)
        if match is not None:
            fields[match[1]].append(match[2])
        elif not line.startswith(("diff --git ", "index ")):
            raise BadPatch(f"{name}: cannot read the header line {line!r}")
    if len(fields["Why"]) != 1 or not fields["Caught-by"]:
        raise BadPatch(f"{name}: the header needs one Why and at least one Caught-by")
    hunks = tuple(_read_hunks(name, (mark + diff).strip("\n").split("\n")))
    return Mutation(name, fields["Why"][0], tuple(fields["Caught-by"]), hunks)


def _read_hunks(name: str, lines: Sequence[str]) -> Iterator[Hunk]:
    path, at = "", 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif match := _HUNK.match(line):
            counts = [1 if count is None else int(count) for count in match.groups()]
            hunk, at = _read_hunk(name, path, lines, at, counts)
            yield hunk
        elif not line.startswith(("--- a/", "diff --git ", "index ")):
            raise BadPatch(f"{name}: cannot read the diff line {line!r}")


def _read_hunk(
    name: str, path: str, lines: Sequence[str], at: int, counts: Sequence[int]
) -> tuple[Hunk, int]:
    """Read the hunk whose body starts at line `at`. Return it and where it ends."""
    old: list[str] = []
    new: list[str] = []
    context = 0
    while len(old) < counts[0] or len(new) < counts[1]:
        # An empty line of context may have lost its blank.
        line = (lines[at] if at < len(lines) else "end") or " "
        if line[0] not in " -+":
            raise BadPatch(f"{name}: a hunk is cut at {line!r}")
        if line[0] != "+":
            old.append(line[1:])
        if line[0] != "-":
            new.append(line[1:])
        context += line[0] == " "
        at += 1
    if [len(old), len(new)] != list(counts) or not old or old == new:
        raise BadPatch(f"{name}: a hunk miscounts, changes nothing or has no old line")
    return Hunk(path, tuple(old), tuple(new), context), at


def place_of(hunk: Hunk, lines: Sequence[str]) -> int:
    """Index of the hunk's first old line in `lines` of its file.

    Raises
    ------
    DoesNotApply
        There is no such place, or more than one.
    """
    size = len(hunk.old)
    places = [
        start
        for start in range(len(lines) - size + 1)
        if tuple(lines[start : start + size]) == hunk.old
    ]
    if len(places) != 1:
        raise DoesNotApply(f"{hunk.path} has {len(places)} places like {hunk.old}")
    return places[0]


def mutated(mutation: Mutation, root: Path = REPOSITORY) -> dict[str, str]:
    """Return the text of each file below `root` that the mutation changes, by path.

    Raises
    ------
    DoesNotApply
        A file is missing, or a hunk does not fit at exactly one place.
    """
    texts: dict[str, str] = {}
    for hunk in mutation.hunks:
        file = root / hunk.path
        if hunk.path not in texts and not file.is_file():
            raise DoesNotApply(f"there is no {hunk.path}")
        lines = (texts.get(hunk.path) or file.read_text()).split("\n")
        start = place_of(hunk, lines)
        lines[start : start + len(hunk.old)] = hunk.new
        texts[hunk.path] = "\n".join(lines)
    return texts


def copy_tree(source: Path, target: Path) -> Path:
    """Copy what the tests need from repository `source` to the new folder `target`."""
    target.mkdir(parents=True)
    for name in COPIED:
        if (source / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source / name, target / name, ignore=ignore)
        else:
            shutil.copy2(source / name, target / name)
    return target


def environment(root: Path) -> dict[str, str]:
    """Return the variables for a process that imports the package of the copy `root`."""
    # PYTHONPATH comes before the editable install of the environment.
    variables = {**os.environ, "PYTHONPATH": str(root / "python")}
    # Each test starts several processes, which then share what one has compiled.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables


def check_imported(root: Path) -> None:
    """Raise RuntimeError if Python does not import the package of the copy `root`."""
    code = "import sglang_dcp; print(sglang_dcp.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
    )
    wanted = root / "python/sglang_dcp/__init__.py"
    if done.returncode or Path(done.stdout.strip()) != wanted:
        said = done.stdout.strip() or done.stderr.strip()
        raise RuntimeError(f"Python does not import {wanted}: {said}")


def run_pytest(
    root: Path, selection: Sequence[str], *, stop_at_first: bool = True
) -> Outcome:
    """Run the tests of `selection`, which are pytest's arguments, in the copy `root`.

    Whatever still works in that folder at the end is killed.
    """
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"--rootdir={root}", "-c", "setup.cfg"]
    command += [f"--basetemp={root / 'pytest'}", f"--junitxml={report}"]
    command += ["-x"] * stop_at_first + list(selection)
    with (root / "printed.txt").open("w+") as printed:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment(root),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        code: Optional[int] = None
        try:
            code = process.wait(TIMEOUT_S * len(selection))
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            process.wait()
            _kill_below(root)
        printed.seek(0)
        return Outcome(code, *_count(report), printed.read())


def _kill_below(root: Path) -> None:
    """Kill the ranks and servers that tests left: those whose working folder is in `root`.

    Tests start them in sessions of their own, so no process group holds them.
    """
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(root):
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            # It has ended meanwhile, or is not ours.
            continue


def _count(report: Path) -> tuple[int, int]:
    """Return how many tests passed, and how many failed or had an error."""
    if not report.is_file():
        return 0, 0
    count = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in count:
            count[name] += int(suite.get(name, 0))
    failed = count["failures"] + count["errors"]
    return count["tests"] - failed - count["skipped"], failed


def arguments_of(caught_by: str) -> list[str]:
    """Return pytest's arguments for a `Caught-by` line."""
    path, dash_k, expression = caught_by.partition(" -k ")
    return [path, "-k", expression.strip("\"'")] if dash_k else [caught_by]


def judge(outcome: Outcome) -> tuple[str, str]:
    """Return the result of a run under a mutation, and the reason if it is not caught."""
    if outcome.code == 1 and outcome.failed:
        return CAUGHT, ""
    if outcome.code == 0 and outcome.passed:
        return SURVIVED, ""
    if outcome.code is None:
        return DID_NOT_RUN, "no end in time"
    if outcome.code == 0:
        return DID_NOT_RUN, "all were skipped"
    last = (outcome.printed.strip() or "no output").splitlines()[-1]
    return DID_NOT_RUN, f"pytest ended with {outcome.code}: {last}"


def check(base: Path, mutation: Mutation) -> Verdict:
    """Run the tests of a mutation in a copy of `base`."""
    try:
        texts = mutated(mutation, base)
    except DoesNotApply as error:
        return Verdict(mutation, DOES_NOT_APPLY, str(error))
    root = copy_tree(base, base.parent / mutation.name)
    try:
        for path, text in texts.items():
            (root / path).write_text(text)
        check_imported(root)
        for caught_by in mutation.caught_by:
            result, reason = judge(run_pytest(root, arguments_of(caught_by)))
            if result != CAUGHT:
                return Verdict(mutation, result, f"{caught_by} {reason}".strip())
        return Verdict(mutation, CAUGHT)
    finally:
        shutil.rmtree(root)


def fault_unmutated(base: Path, mutations: Iterable[Mutation]) -> str:
    """Return what pytest prints if a named test fails without a mutation, or ""."""
    check_imported(base)
    # By file, so that the ranks of a test file start once.
    lines = sorted({line for mutation in mutations for line in mutation.caught_by})
    runs = [[line for line in lines if " -k " not in line]]
    runs += [arguments_of(line) for line in lines if " -k " in line]
    for selection in filter(None, runs):
        outcome = run_pytest(base, selection, stop_at_first=False)
        if outcome.code != 0:
            return f"{outcome.printed.strip()}\npytest ended with {outcome.code}"
    return ""


def check_all(mutations: Sequence[Mutation], jobs: int) -> Iterator[Verdict]:
    """Yield the verdict of each mutation in turn.

    Raises
    ------
    RuntimeError
        A named test fails without a mutation.
    """
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        base = copy_tree(REPOSITORY, Path(folder).resolve() / "_unmutated")
        if printed := fault_unmutated(base, mutations):
            raise RuntimeError(f"without a mutation:\n{printed}")
        pool = ThreadPoolExecutor(max_workers=jobs)
        try:
            yield from pool.map(partial(check, base), mutations)
        finally:
            # Else an interrupt would wait for all mutations that are left.
            pool.shutdown(cancel_futures=True)


def options_of(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at once")
    options = parser.parse_args(argv)
    if unknown := sorted(set(options.names) - set(names())):
        parser.error(f"no such mutation: {', '.join(unknown)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: it must be at least 1")
    return options


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Check the named mutations, or all. Return 0 if all are caught."""
    options = options_of(argv)
    mutations = [read_mutation(name) for name in options.names or names()]
    print("the named tests run without a mutation first", flush=True)
    caught = 0
    try:
        for verdict in check_all(mutations, options.jobs):
            print(verdict, flush=True)
            caught += verdict.result == CAUGHT
    except RuntimeError as error:
        print(error)
        return 1
    print(f"{caught} of {len(mutations)} mutations are caught")
    return 0 if caught == len(mutations) else 1


if __name__ == "__main__":
    sys.exit(main())
