"""The series itself: plain `git am`, exact hunks, headers, budget, export and import.

Only here is it seen that the patches are what a fork's own tools take, and that what
export writes does not depend on the user's git settings.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import patch_trees
from helpers.patch_trees import VERSION, read_files, write_tree
from sglang_dcp import releases
from sglang_dcp.patch import cli, lint, manifest
from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.export import git
from sglang_dcp.patch.header import FIELDS, read_header
from sglang_dcp.patch.manifest import folder_of, read_series
from sglang_dcp.patch.unified import apply_hunks, read_patch

FOLDER = folder_of(VERSION)
NAMES = read_series(FOLDER)
FIXES = [name for name in NAMES if name.startswith("fix-")]
WHEEL = releases.load_release(VERSION).wheel["name"]

each_series = pytest.mark.parametrize("version", manifest.versions())
each_patch = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git import of the release's touched files, clean, at tag `base`."""
    folder = tmp_path / "checkout"
    write_tree(folder / "python" / "sglang", patch_trees.pristine())
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "import")
    git(folder, "tag", "base")
    return folder


def am(folder: Path, name: str) -> None:
    """`git am` as anybody runs it: no option, and not a word on standard error."""
    identity = {"GIT_COMMITTER_NAME": "n", "GIT_COMMITTER_EMAIL": "e@e.invalid"}
    done = subprocess.run(
        ["git", "am", str(FOLDER / name)],
        cwd=folder,
        env={**os.environ, **identity},
        capture_output=True,
        text=True,
    )
    subject = read_header(name, (FOLDER / name).read_bytes())["Subject"]
    applied = f"Applying: {name.removesuffix('.patch')}: {subject}\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, applied, "")


def test_git_am_in_order(checkout: Path) -> None:
    """No fuzz (git has none), no warning, and the bytes that `patch apply` makes."""
    for name in NAMES:
        am(checkout, name)
    assert git(checkout, "status", "--porcelain") == b""
    assert read_files(checkout / "python" / "sglang") == patch_trees.patched()


@pytest.mark.parametrize("name", FIXES)
def test_fix_stands_alone(name: str, checkout: Path) -> None:
    am(checkout, name)
    assert b"sglang_dcp" not in git(checkout, "diff", "base", "HEAD")


@each_series
def test_no_patch_leaves_trailing_blanks(version: str) -> None:
    lines = added_lines(version)
    assert lines and not [line for line in lines if line != line.rstrip()]


def added_lines(version: str) -> list[str]:
    """Each line with a plus sign, of all patches of a series."""
    folder = folder_of(version)
    texts = [(folder / name).read_text() for name in read_series(folder)]
    lines = [line for text in texts for line in text.split("\n")]
    return [line for line in lines if line.startswith("+")]


@each_patch
def test_each_prefix_of_the_series_compiles(name: str) -> None:
    """A fork may stop after any patch."""
    texts = patch_trees.pristine()
    for earlier in NAMES[: NAMES.index(name) + 1]:
        for diff in read_patch(earlier, (FOLDER / earlier).read_bytes()):
            path = diff.path.removeprefix(manifest.PREFIX)
            texts[path] = apply_hunks(texts[path], diff)
    for path, text in texts.items():
        compile(text, path, "exec")
        uses = text.count(b'hook("') > 0
        assert (b"from sglang_dcp.hooks.inline import hook\n" in text) == uses, path


@each_series
def test_the_series_has_the_hooks_of_its_release(version: str) -> None:
    """Each once, and no other."""
    from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, rows_of

    calls = re.findall(r"\bhook\(([^)]*)\)", "\n".join(added_lines(version)))
    written = [name.strip(' "') for call in calls for name in call.split(",")]
    wanted = [hook.name for hook in rows_of(HOOKS + CPU_HOOKS, version)]
    assert sorted(written) == sorted(wanted)


def test_lint_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lint"]) == 0
    assert capsys.readouterr().out == f"{len(manifest.versions())} series, 0 faults\n"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return patch_trees.use_copies(tmp_path, monkeypatch)


def test_export_writes_the_same_bytes(
    checkout: Path,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From commits, whatever the user's git is set to; the wheel's hash aside."""
    hostile = tmp_path / "gitconfig"
    hostile.write_text(
        "[diff]\nnoprefix = true\nalgorithm = patience\n[format]\nsignature = x\n"
        "[core]\nautocrlf = true\n[apply]\nwhitespace = fix\n"
    )
    for name in NAMES:
        git(checkout, "am", "-q", str(FOLDER / name))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(hostile))
    before, known = read_files(copied), releases.file_of(VERSION).read_text()
    wheel = _wheel(tmp_path / WHEEL, patch_trees.pristine())
    arguments = ["export", "--target", str(checkout), "--wheel", str(wheel)]
    (copied / VERSION / "stray").write_text("of an earlier export")
    assert cli.main(arguments) == 0
    assert read_files(copied) == before
    old = known.splitlines()
    new = releases.file_of(VERSION).read_text().splitlines()
    assert [a for a, b in zip(old, new) if a != b] == [old[4]] and '"sha256"' in old[4]


def _wheel(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(f"sglang/{name}", text)
    return path


def test_export_from_another_base_is_refused(
    checkout: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The series must be made on the published wheel."""
    git(checkout, "am", "-q", str(FOLDER / NAMES[0]))
    other = {name: text + b"\n" for name, text in patch_trees.pristine().items()}
    wheel = _wheel(tmp_path / WHEEL, other)
    before = read_files(copied)
    arguments = ["export", "--target", str(checkout), "--wheel", str(wheel)]
    assert cli.main(arguments) == 2
    assert f"at base is not the file in {WHEEL}" in capsys.readouterr().err
    assert read_files(copied) == before


def test_what_does_not_load_leaves_the_series_as_it_is(
    checkout: Path,
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(folder: Path, release: releases.Release) -> None:
        assert (folder / NAMES[0]).exists()
        raise PatchError("does not load")

    monkeypatch.setattr("sglang_dcp.patch.export.read_folder", refuse)
    git(checkout, "am", "-q", str(FOLDER / NAMES[0]))
    wheel = _wheel(tmp_path / WHEEL, patch_trees.pristine())
    before, known = read_files(copied), releases.file_of(VERSION).read_text()
    assert cli.main(["export", "--target", str(checkout), "--wheel", str(wheel)]) == 2
    assert "does not load" in capsys.readouterr().err
    assert read_files(copied) == before
    assert releases.file_of(VERSION).read_text() == known


def test_export_of_nothing_is_refused(
    checkout: Path, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = _wheel(tmp_path / WHEEL, patch_trees.pristine())
    assert cli.main(["export", "--target", str(checkout), "--wheel", str(wheel)]) == 2
    assert "no commits" in capsys.readouterr().err


def test_import_makes_a_commit_for_each_patch(tmp_path: Path) -> None:
    from sglang_dcp.patch.export import import_series

    source = write_tree(tmp_path / "site" / "sglang", patch_trees.pristine())
    target = tmp_path / "checkout"
    assert import_series(target, VERSION, source.parent) == 0
    assert len(git(target, "rev-list", "base..HEAD").split()) == len(NAMES)
    assert read_files(target / "python" / "sglang") == patch_trees.patched()
    with pytest.raises(PatchError, match="exists; name a new folder"):
        import_series(target, VERSION, source.parent)


def test_import_takes_the_installed_release(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Path, str]] = []

    def record(target: Path, version: str) -> int:
        made.append((target, version))
        return 0

    monkeypatch.setattr(cli, "import_series", record)
    assert cli.main(["import", "here"]) == 0
    assert cli.main(["import", "there", "--version", "9.9"]) == 0
    assert made == [(Path("here"), VERSION), (Path("there"), "9.9")]


def _spoil(copied: Path, name: str, old: bytes, new: bytes) -> list[str]:
    """Faults after one edit of a patch, whose hash the release then knows."""
    folder = copied / VERSION
    text = (folder / name).read_bytes()
    assert old in text
    spoiled = text.replace(old, new, 1)
    (folder / name).write_bytes(spoiled)
    hashes = releases.file_of(VERSION)
    known = hashes.read_text()
    known = known.replace(manifest.sha256(text), manifest.sha256(spoiled))
    hashes.write_text(known)
    return lint.faults(VERSION)


@pytest.mark.parametrize("field", FIELDS)
def test_lint_names_a_missing_field(field: str, copied: Path) -> None:
    [fault] = _spoil(copied, "cpu.patch", f"\n{field}: ".encode(), b"\nNote: ")
    assert fault.startswith("cpu.patch: ")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param(b"[PATCH] cpu:", b"[PATCH] gpu:", "Subject is", id="name"),
        pytest.param(
            b"Forwarded: no", b"Forwarded: ", "Forwarded is empty", id="empty"
        ),
        pytest.param(b"Last-Update: 20", b"Last-Update: ", "YYYY-MM-DD", id="date"),
        pytest.param(b"\n@@ -", b"\n@@ +", "no hunk at", id="no-hunk"),
        pytest.param(b",6 +", b",7 +", "is cut", id="miscount"),
    ],
)
def test_lint_names_a_spoiled_patch(
    old: bytes, new: bytes, fault: str, copied: Path
) -> None:
    [found] = _spoil(copied, "cpu.patch", old, new)
    assert "cpu.patch" in found and fault in found


def test_lint_names_strays_budget_and_a_stale_readme(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied / VERSION
    (folder / "notes.txt").write_text("x")
    [fault] = lint.faults(VERSION)
    assert "notes.txt is not in the series" in fault
    (folder / "notes.txt").unlink()
    (copied / "README.md").write_text("by hand")
    assert cli.main(["lint"]) == 1
    assert "README.md is stale" in capsys.readouterr().out
    added = {
        name: len(re.findall(r"^\+(?!\+\+ )", (folder / name).read_text(), re.M))
        for name in (folder / "series").read_text().split()
    }
    limit = sorted(added.values())[-3]
    monkeypatch.setattr(lint, "MAX_ADDED_LINES", limit)
    over = [name for name, lines in added.items() if lines > limit]
    assert over and [fault.split()[0] for fault in lint.faults(VERSION)] == over


HEAD = b"Subject: x\n\ndiff --git a/f b/f\nindex 1..2 100644\n--- a/f\n+++ b/f\n"
HUNK = HEAD + b"@@ -2,3 +2,3 @@ def x\n b\n-c\n+C\n d\n"


def test_hunk_fits_at_its_own_line_only() -> None:
    [diff] = read_patch("p", HUNK)
    assert apply_hunks(b"a\nb\nc\nd\ne", diff) == b"a\nb\nC\nd\ne"
    assert apply_hunks(b"a\nb\nC\nd\ne", diff.reversed()) == b"a\nb\nc\nd\ne"
    for other in (b"b\nc\nd\n", b"a\na\nb\nc\nd\n", b"a\nb \nc\nd\n", b"a\nb\nc", b""):
        with pytest.raises(PatchError, match="f has other lines at 2"):
            apply_hunks(other, diff)


def test_carriage_returns_are_part_of_a_line() -> None:
    [diff] = read_patch("p", HUNK)
    assert apply_hunks(b"a\rA\nb\nc\nd\n", diff) == b"a\rA\nb\nC\nd\n"
    with pytest.raises(PatchError):
        apply_hunks(b"a\r\nb\r\nc\r\nd\r\n", diff)


@pytest.mark.parametrize(
    "patch",
    [
        pytest.param(b"Subject: x\n", id="no-diff"),
        pytest.param(HEAD, id="no-hunk"),
        pytest.param(HUNK.replace(b"+C\n", b""), id="cut"),
        pytest.param(HUNK + b" e\n", id="too-long"),
        pytest.param(HUNK + b"\\ No newline at end of file\n", id="no-newline"),
        pytest.param(HUNK.replace(b"b/f\ni", b"b/g\ni"), id="rename"),
        pytest.param(
            HUNK.replace(b"index", b"new file mode 100644\nindex"), id="new-file"
        ),
        pytest.param(HUNK.replace(b"--- a/f", b"--- /dev/null"), id="from-nothing"),
        pytest.param(HUNK.replace(b"index", b"old mode 100644\nindex"), id="mode"),
    ],
)
def test_other_than_changed_lines_is_refused(patch: bytes) -> None:
    with pytest.raises(PatchError, match="^p"):
        read_patch("p", patch)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
