"""The commands `patch import` and `patch export`: a series as commits, and back."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Optional

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import (
    PREFIX,
    folder_of,
    read_folder,
    read_series,
    sha256,
)
from sglang_dcp.patch.readme import render_readme
from sglang_dcp.patch.tree import find_package
from sglang_dcp.releases import (
    FileHashes,
    Release,
    UnknownRelease,
    load_release,
    write_release,
)

_AUTHOR = ("sglang-dcp maintainers", "maintainers@sglang-dcp.invalid")
# They replace the user's git settings, which must not change what is exported.
_SETTINGS = (
    f"user.name={_AUTHOR[0]}",
    f"user.email={_AUTHOR[1]}",
    "apply.whitespace=error-all",
    "core.autocrlf=false",
    "commit.gpgSign=false",
    "diff.algorithm=myers",
    "diff.noprefix=false",
    "diff.mnemonicPrefix=false",
)


def git(folder: Path, *arguments: str) -> bytes:
    """Run git in `folder` and return its standard output.

    Raises PatchError if git fails, or prints anything to standard error.
    """
    settings = [part for setting in _SETTINGS for part in ("-c", setting)]
    env = {key: value for key, value in os.environ.items() if key[:4] != "GIT_"}
    env.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=folder, env=env, capture_output=True
    )
    if done.returncode or done.stderr:
        raise PatchError(f"git {arguments[0]} in {folder}: {done.stderr.decode()}")
    return done.stdout


def import_series(target: Path, version: str, source: Optional[Path] = None) -> int:
    """Make a checkout in `target`: the release at tag `base`, and a commit for each patch.

    `source` is where to look for the installed SGLang (see `find_package`). Raises
    PatchError if `target` exists or a patch does not apply.
    """
    if target.exists():
        raise PatchError(f"{target} exists; name a new folder")
    package = find_package(source)
    shutil.copytree(
        package, target / PREFIX, ignore=shutil.ignore_patterns("__pycache__")
    )
    git(target, "init", "-q", "-b", "main")
    git(target, "add", "-A", "-f")
    git(target, "commit", "-q", "-m", f"sglang {version}, from the wheel")
    git(target, "tag", "base")
    folder = folder_of(version)
    names = read_series(folder) if folder.is_dir() else []
    for name in names:
        git(target, "am", "-q", str(folder / name))
    print(f"{target}: tag base, and {len(names)} patches")
    return 0


def export_series(target: Path, base: str, wheel: Path) -> int:
    """Write the series for the commits `base`..HEAD of the checkout `target`.

    Raises
    ------
    PatchError
        A touched file at `base` is not the one in `wheel`, or a header is wrong.
    """
    version = wheel.name.split("-")[1]
    patches = dict(_patches(target, base))
    release = _release(version, wheel, patches, _hashes(target, base, wheel))
    folder = folder_of(version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the last series first, which stays if the new one does not load.
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        new = Path(beside) / version
        _write_series(new, patches)
        read_folder(new, release)
        if folder.exists():
            folder.rename(Path(beside) / "last")
        new.rename(folder)
    write_release(release)
    folder_of("README.md").write_text(render_readme())
    print(f"{folder}: {len(patches)} patches, {len(release.touched())} files")
    return 0


def _write_series(folder: Path, patches: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, patch in patches.items():
        (folder / name).write_bytes(patch)
    (folder / "series").write_text("".join(f"{name}\n" for name in patches))


def _release(
    version: str,
    wheel: Path,
    patches: dict[str, bytes],
    touched: dict[str, FileHashes],
) -> Release:
    """Make the release's hashes for this series. Untouched files keep their hash."""
    try:
        known = load_release(version).files
    except UnknownRelease:
        known = {}
    untouched = {name: FileHashes(sha.original) for name, sha in known.items()}
    return Release(
        version,
        {**untouched, **touched},
        {name: sha256(patch) for name, patch in patches.items()},
        {"name": wheel.name, "sha256": sha256(wheel.read_bytes())},
    )


def _patches(target: Path, base: str) -> list[tuple[str, bytes]]:
    """Return name and mail of each commit. The name is the first part of its subject."""
    found = []
    for commit in (
        git(target, "rev-list", "--reverse", f"{base}..HEAD").decode().split()
    ):
        subject = git(target, "show", "-s", "--format=%s", commit).decode()
        name = f"{subject.partition(':')[0]}.patch"
        options = ("--stdout", "--zero-commit", "--full-index", "--no-signature")
        mail = git(target, "format-patch", "-1", "--stat=80", *options, commit)
        mail = mail.rstrip(b"\n") + b"\n"
        read_header(name, mail)
        found.append((name, mail))
    if len({name for name, _ in found}) < len(found) or not found:
        raise PatchError(f"{base}..HEAD of {target}: no commits, or two with one name")
    return found


def _hashes(target: Path, base: str, wheel: Path) -> dict[str, FileHashes]:
    paths = git(target, "diff", "--name-only", base, "HEAD").decode().split()
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for path in paths:
            before = git(target, "show", f"{base}:{path}")
            name = path.removeprefix(PREFIX)
            if before != archive.read(f"sglang/{name}"):
                raise PatchError(f"{path} at {base} is not the file in {wheel.name}")
            after = git(target, "show", f"HEAD:{path}")
            found[name] = FileHashes(sha256(before), sha256(after))
    return found
