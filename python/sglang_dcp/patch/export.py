"""`patch import` and `patch export`: a series as commits on a checkout, and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Optional

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.header import read_header
from sglang_dcp.patch.manifest import (
    NAME,
    PREFIX,
    folder_of,
    load_series,
    read_series,
    sha256,
)
from sglang_dcp.patch.readme import render_readme
from sglang_dcp.patch.tree import find_package

_AUTHOR = ("sglang-dcp maintainers", "maintainers@sglang-dcp.invalid")
# Independent of the user's own git settings: what is exported must not vary with them.
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
    """Standard output of git in `folder`; what it says on standard error is an error."""
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
    """A new checkout in `target`: the release at tag `base`, a commit for each patch."""
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
    names = read_series(folder) if (folder / NAME).is_file() else []
    for name in names:
        git(target, "am", "-q", str(folder / name))
    print(f"{target}: tag base, and {len(names)} patches")
    return 0


def export_series(target: Path, base: str, wheel: Path) -> int:
    """Write the series for the commits `base`..HEAD of the checkout `target`.

    Raises
    ------
    PatchError
        Where a touched file at `base` is not the one in `wheel`, or a header is wrong.
    """
    version = wheel.name.split("-")[1]
    patches = dict(_patches(target, base))
    files = _hashes(target, base, wheel)
    folder = folder_of(version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it first: what does not load leaves the last series as it is.
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        new = Path(beside) / version
        _write_series(new, version, wheel, patches, files)
        load_series(new)
        if folder.exists():
            folder.rename(Path(beside) / "last")
        new.rename(folder)
    folder_of("README.md").write_text(render_readme())
    print(f"{folder}: {len(patches)} patches, {len(files)} files")
    return 0


def _write_series(
    folder: Path,
    version: str,
    wheel: Path,
    patches: dict[str, bytes],
    files: dict[str, Any],
) -> None:
    folder.mkdir()
    for name, patch in patches.items():
        (folder / name).write_bytes(patch)
    (folder / "series").write_text("".join(f"{name}\n" for name in patches))
    manifest = {
        "sglang": version,
        "wheel": {"name": wheel.name, "sha256": sha256(wheel.read_bytes())},
        "patches": {name: sha256(patch) for name, patch in patches.items()},
        "files": files,
    }
    (folder / NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def _patches(target: Path, base: str) -> list[tuple[str, bytes]]:
    """Name and mail of each commit; the name is what its subject begins with."""
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
        raise PatchError(f"{base}..HEAD of {target}: no commits, or two of one name")
    return found


def _hashes(target: Path, base: str, wheel: Path) -> dict[str, Any]:
    paths = git(target, "diff", "--name-only", base, "HEAD").decode().split()
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for path in paths:
            before = git(target, "show", f"{base}:{path}")
            name = path.removeprefix(PREFIX)
            if before != archive.read(f"sglang/{name}"):
                raise PatchError(f"{path} at {base} is not the file in {wheel.name}")
            after = git(target, "show", f"HEAD:{path}")
            found[name] = {"before": sha256(before), "after": sha256(after)}
    return found
