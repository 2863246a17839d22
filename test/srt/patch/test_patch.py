"""`patch apply` and `revert` on copies of SGLang's touched files, and all that can go wrong.

Only here is it seen that a kill at any moment, a foreign environment that shares files,
or a manifest that lies leaves nothing behind that a next run cannot name or mend.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from helpers import patch_trees
from helpers.patch_trees import SITE, VERSION, read_files, write_tree
from sglang_dcp import releases
from sglang_dcp.patch import cli, manifest, swap
from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.manifest import load_series, sha256

COUNT = len(patch_trees.series().files)
KILLED = 9


@pytest.fixture(scope="module")
def pristine() -> dict[str, bytes]:
    return patch_trees.pristine()


@pytest.fixture(scope="module")
def patched() -> dict[str, bytes]:
    return patch_trees.patched()


@pytest.fixture
def package(tmp_path: Path, pristine: dict[str, bytes]) -> Path:
    """The pristine package of an environment `tmp_path / "env"`."""
    return write_tree(tmp_path / "env" / SITE / "sglang", pristine)


def run(command: str, target: Path) -> int:
    return cli.main([command, "--target", str(target)])


def refused(command: str, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal, after which no file is another one."""
    before = read_files(target)
    capsys.readouterr()
    assert run(command, target) == 2
    line = capsys.readouterr().err
    assert line.startswith("sglang-dcp: error: ") and line.count("\n") == 1
    assert read_files(target) == before
    return line


def test_apply_and_revert_give_back_every_byte(
    package: Path, pristine: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = patch_trees.series().files
    (package / "srt" / "mine.py").write_text("not in the manifest\n")
    assert run("status", package) == run("check", package) == 0
    assert run("apply", package) == 0
    found = read_files(package)
    assert found.pop("srt/mine.py") == b"not in the manifest\n"
    assert {n: sha256(t) for n, t in found.items()} == {
        name: each.patched for name, each in hashes.items()
    }
    assert run("status", package) == run("check", package) == run("apply", package) == 0
    assert f"patched, 0 of {COUNT} files changed" in capsys.readouterr().out
    assert run("revert", package) == 0
    found = read_files(package)
    del found["srt/mine.py"]
    assert found == pristine
    recorded = patch_trees.recorded_hashes()
    assert {n: patch_trees.record_hash(t) for n, t in found.items()} == recorded
    assert run("revert", package) == 0


@pytest.mark.parametrize(
    ("place", "target"),
    [
        pytest.param("python/sglang", ".", id="checkout"),
        pytest.param(f"{SITE}/sglang", ".", id="environment"),
        pytest.param(f"{SITE}/sglang", str(SITE), id="site-packages"),
        pytest.param(f"{SITE}/sglang", f"{SITE}/sglang", id="package"),
    ],
)
def test_target_is_found(
    place: str, target: str, tmp_path: Path, patched: dict[str, bytes]
) -> None:
    package = write_tree(tmp_path / place, patch_trees.pristine())
    assert run("apply", tmp_path / target) == 0
    assert read_files(package) == patched


def test_no_target_or_two(
    tmp_path: Path, pristine: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "found none; pass --target" in refused("apply", tmp_path, capsys)
    write_tree(tmp_path / "sglang", pristine)
    write_tree(tmp_path / "python" / "sglang", pristine)
    assert "looked for one" in refused("apply", tmp_path, capsys)


def test_inside_another_git_repository(
    tmp_path: Path, package: Path, patched: dict[str, bytes]
) -> None:
    """There `git apply` skips each file and says that all is well."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitignore").write_text("env\n")
    assert run("apply", tmp_path / "env") == 0
    assert read_files(package) == patched


def test_environment_that_shares_files_is_not_changed(
    tmp_path: Path, package: Path, pristine: dict[str, bytes]
) -> None:
    """As package managers do it: one inode in the cache and in every environment."""
    other = tmp_path / "other" / "sglang"
    for name in pristine:
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(package / name, other / name)
    inodes = {name: (other / name).stat().st_ino for name in pristine}
    for command in ("apply", "revert", "apply"):
        assert run(command, package) == 0
        assert read_files(other) == pristine
        assert {name: (other / name).stat().st_ino for name in pristine} == inodes
    assert not {(package / name).stat().st_ino for name in pristine} & {
        *inodes.values()
    }


def test_links_to_shared_files_are_replaced(
    tmp_path: Path, package: Path, pristine: dict[str, bytes], patched: dict[str, bytes]
) -> None:
    linked = tmp_path / "linked" / "sglang"
    linked.parent.mkdir()
    subprocess.run(["cp", "-rs", package, linked], check=True)
    assert run("apply", linked) == 0
    assert read_files(linked) == patched and read_files(package) == pristine


def test_linked_folders_are_refused(
    tmp_path: Path, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sglang").symlink_to(package)
    assert f"is a link to {package}" in refused("apply", tmp_path, capsys)
    moved = shutil.move(package / "srt" / "models", tmp_path / "models")
    (package / "srt" / "models").symlink_to(moved)
    assert "outside of" in refused("apply", package, capsys)


def test_mode_is_kept(package: Path, pristine: dict[str, bytes]) -> None:
    path = package / next(iter(pristine))
    path.chmod(0o640)
    assert run("apply", package) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def killed_at(call: int, command: str, target: Path) -> bool:
    """Run in a child that is gone at its `call`-th step; whether it came so far.

    A step is a new file on disk (fsync) or a rename, each just before it is done.
    """
    child = os.fork()
    if child == 0:
        steps = iter(range(call))

        def counted(step: Callable[..., None]) -> Callable[..., None]:
            def do(*arguments: object) -> None:
                if next(steps, None) is None:
                    os._exit(KILLED)
                step(*arguments)

            return do

        swap.os.fsync = counted(os.fsync)  # type: ignore[attr-defined]
        swap.os.replace = counted(os.replace)  # type: ignore[attr-defined]
        os._exit(run(command, target))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.parametrize("then", ["apply", "revert"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_killed_at_any_step(
    command: str,
    then: str,
    package: Path,
    pristine: dict[str, bytes],
    patched: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every file is old or new, `status` says so, and either command ends it."""
    start = pristine if command == "apply" else patched
    goal = patched if then == "apply" else pristine
    for call in range(2 * COUNT):
        shutil.rmtree(package)
        write_tree(package, start)
        assert killed_at(call, command, package)
        found = read_files(package)
        for name in pristine:
            assert found[name] in (pristine[name], patched[name])
        capsys.readouterr()
        done = sum(found[name] != start[name] for name in start)
        assert done == max(0, call - COUNT)
        assert run("status", package) == (1 if done else 0)
        said = capsys.readouterr().out
        assert ("half patched" in said) == bool(done)
        assert "left over" in said
        assert run(then, package) == 0
        assert read_files(package) == goal
    assert not killed_at(2 * COUNT, command, package)


def test_failure_at_any_rename_takes_all_back(
    package: Path,
    pristine: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = os.replace
    for call in range(COUNT):
        steps = iter(range(COUNT))

        def full(source: Path, target: Path) -> None:
            if next(steps, None) == call:
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(swap.os, "replace", full)
            line = refused("apply", package, capsys)
        assert "No space left" in line and "nothing was changed" in line
        assert read_files(package) == pristine


def test_read_only_site_packages(
    pristine: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else's environment, in a child who is not its owner."""
    folder = Path(tempfile.mkdtemp())
    try:
        package = write_tree(folder / "sglang", pristine)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            line = refused("apply", package, capsys)
            os._exit("Permission denied" not in line or "the owner" not in line)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read_files(package) == pristine
    finally:
        for path in folder.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("start", ["pristine", "patched"])
@pytest.mark.parametrize("command", ["apply", "revert", "check"])
def test_one_changed_line_is_refused(
    command: str,
    start: str,
    package: Path,
    patched: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Far from any hunk, where fuzz and offsets would not notice."""
    if start == "patched":
        write_tree(package, patched)
    path = package / "srt/models/utils.py"
    path.write_bytes(path.read_bytes() + b"\n")
    line = refused(command, package, capsys)
    assert f"1 of {COUNT} files" in line and "srt/models/utils.py" in line
    assert f"reinstall sglang=={VERSION}" in line
    assert run("status", package) == 1
    assert "unknown   srt/models/utils.py" in capsys.readouterr().out


def test_missing_file_is_refused(
    package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "srt/models/utils.py").unlink()
    assert "srt/models/utils.py" in refused("apply", package, capsys)


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_half_applied_tree(
    command: str,
    package: Path,
    pristine: dict[str, bytes],
    patched: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However it came about, `status` says what to do, and either command does it."""
    write_tree(package, dict(list(patched.items())[::2]))
    assert run("status", package) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert "half patched" in said and "patch apply, or patch revert" in said
    assert run(command, package) == 0
    assert read_files(package) == (patched if command == "apply" else pristine)


def test_after_a_new_install(
    package: Path,
    pristine: dict[str, bytes],
    patched: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`pip install -U` brings other files; the same release brings pristine ones."""
    newest = len(load_series(manifest.versions()[-1]).files)
    assert run("apply", package) == 0
    left = swap._new_path(package / next(iter(pristine)))
    left.write_text("of a run that was killed\n")
    info = package.parent / "sglang-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: sglang\nVersion: 99.0\n")
    write_tree(package, {name: text + b"# newer\n" for name, text in pristine.items()})
    line = refused("apply", package, capsys)
    assert "sglang 99.0 is installed there" in line
    assert f"{newest} of {newest} files" in line
    assert run("status", package) == 1
    assert f"left over {left.relative_to(package)}" in capsys.readouterr().out
    write_tree(package, pristine)
    assert run("apply", package) == 0
    assert read_files(package) == patched


Spoil = Callable[[Path], object]
Manifest = dict[str, dict[str, Any]]


def _edit(change: Callable[[Manifest], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = releases.file_of(folder.name)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return spoil


def _file(data: Manifest) -> dict[str, str]:
    return data["files"]["srt/models/utils.py"]


def _outside(folder: Path) -> None:
    """A patch that fits its hash and reaches out of the package."""
    path = folder / "fix-mla-merge-nan.patch"
    text = path.read_bytes().replace(
        b"python/sglang/kernels", b"python/sglang/../kernels"
    )
    path.write_bytes(text)
    _edit(lambda data: data["patches"].update({path.name: sha256(text)}))(folder)


LIES: dict[str, tuple[Spoil, str]] = {
    "after": (
        _edit(lambda data: _file(data).update(patched="0" * 64)),
        "do not make of srt/models/utils.py what",
    ),
    "before": (
        _edit(lambda data: _file(data).update(original="0" * 64)),
        "srt/models/utils.py",
    ),
    "patch-hash": (
        _edit(lambda data: data["patches"].update({"groups.patch": "0" * 64})),
        "groups.patch is not the patch that",
    ),
    "file-left-out": (
        _edit(lambda data: data["files"].pop("srt/models/utils.py")),
        "touch other files: srt/models/utils.py",
    ),
    "file-too-many": (
        _edit(lambda data: data["files"].update(x=_file(data))),
        "touch other files: x",
    ),
    "patch-left-out": (
        _edit(lambda data: data["patches"].pop("groups.patch")),
        "name other patches",
    ),
    "other-order": (
        lambda folder: (folder / "series").write_text(
            "\n".join(reversed((folder / "series").read_text().split()))
        ),
        "name other patches",
    ),
    "patch-gone": (
        lambda folder: (folder / "cpu.patch").unlink(),
        "cpu.patch is missing",
    ),
    "outside": (_outside, "not below python/sglang/"),
    "no-json": (
        lambda folder: releases.file_of(folder.name).write_text("{"),
        "cannot be read",
    ),
}


@pytest.fixture
def copied_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield patch_trees.use_copies(tmp_path, monkeypatch) / VERSION


@pytest.mark.parametrize(("spoil", "fault"), LIES.values(), ids=LIES.keys())
def test_manifest_that_lies(
    spoil: Spoil,
    fault: str,
    package: Path,
    copied_series: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(copied_series)
    assert fault in refused("apply", package, capsys)


def test_no_series(
    package: Path, copied_series: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in manifest.versions():
        shutil.rmtree(copied_series.parent / version)
    assert "no patch series in" in refused("apply", package, capsys)


def test_two_runs_at_once(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = os.open(package, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert "another run is at work" in refused("apply", package, capsys)
    finally:
        os.close(handle)
    assert run("apply", package) == 0


def test_file_edited_meanwhile(
    package: Path, pristine: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and renaming; the edit stays, the other files come back."""
    last = list(pristine)[-1]
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        (package / last).write_bytes(b"edited")
        replace(source, target)

    monkeypatch.setattr(swap.os, "replace", slow)
    assert run("apply", package) == 2
    assert read_files(package) == {**pristine, last: b"edited"}


def test_series_of_the_repository_is_sound() -> None:
    for version in manifest.versions():
        load_series(version)
    with pytest.raises(PatchError, match="series is missing"):
        manifest.read_series(Path("/nowhere"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
