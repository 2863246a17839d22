"""Copies of SGLang for the tests of the patches: touched files only, or linked whole."""

from __future__ import annotations

import base64
import hashlib
import shutil
import stat
import subprocess
from importlib.metadata import files
from pathlib import Path

import pytest

from sglang_dcp import releases
from sglang_dcp.patch import manifest
from sglang_dcp.patch.manifest import Series, load_series
from sglang_dcp.patch.tree import find_package, read_tree
from sglang_dcp.releases.installed import sglang_version

SITE = Path("lib/python3.11/site-packages")
# The tests that need SGLang's files test the series of the release that is installed.
VERSION = sglang_version()


def series() -> Series:
    """The series for the installed release."""
    return load_series(VERSION)


def pristine() -> dict[str, bytes]:
    """The release's touched files, also where the installed SGLang is patched."""
    tree = read_tree(find_package(None))
    fixed = {n: tree.series.unpatch(n, tree.contents[n]) for n in tree.named("patched")}
    return {**tree.contents, **fixed}


def patched() -> dict[str, bytes]:
    """The touched files with the whole series."""
    return {name: series().patch(name, text) for name, text in pristine().items()}


def write_tree(package: Path, contents: dict[str, bytes]) -> Path:
    """A package `sglang` of these files alone, with the modes of the installed ones."""
    installed = find_package(None)
    for name, text in contents.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        # git warns of a patch that expects another mode.
        path.chmod(stat.S_IMODE((installed / name).stat().st_mode))
    return package


def read_files(package: Path) -> dict[str, bytes]:
    """Every file below `package`: also one that should not be there."""
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file()
    }


def recorded_hashes() -> dict[str, str]:
    """What the installed wheel's RECORD says of the touched files."""
    known = {str(file): file.hash for file in files("sglang") or ()}
    hashes = {name: known[f"sglang/{name}"] for name in series().files}
    return {name: value.value for name, value in hashes.items() if value is not None}


def record_hash(text: bytes) -> str:
    """A hash as RECORD writes it."""
    digest = hashlib.sha256(text).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def linked_copy(folder: Path) -> Path:
    """A whole importable SGLang of links into the installed one, pristine."""
    folder.mkdir(parents=True, exist_ok=True)
    installed = find_package(None)
    subprocess.run(["cp", "-rs", installed, folder / "sglang"], check=True)
    for name, text in pristine().items():
        (folder / "sglang" / name).unlink()
        (folder / "sglang" / name).write_bytes(text)
    return folder / "sglang"


def use_copies(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Series and hashes that a test may spoil; returns the folder of the series."""
    for module, name in ((manifest, "patches"), (releases, "releases")):
        copied = shutil.copytree(module.FOLDER, folder / name)
        monkeypatch.setattr(module, "FOLDER", copied)
    return folder / "patches"
