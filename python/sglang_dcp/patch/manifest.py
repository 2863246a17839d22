"""A series on disk: the file `series` and the patches, checked by hashes of `releases`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sglang_dcp import releases
from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.unified import FileDiff, apply_hunks, read_patch
from sglang_dcp.releases import FileHashes, Release, UnknownRelease

PREFIX = "python/sglang/"


def _folder() -> Path:
    """Find the patches: inside the package in a wheel, at the root in a checkout."""
    inside = Path(__file__).parent.parent / "patches"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "patches"


FOLDER = _folder()


class Series(NamedTuple):
    """A series that matches the release's hashes.

    Attributes
    ----------
    version : str
        Version of SGLang.
    files : dict
        Hashes of each touched file, by path below the `sglang` package.
    diffs : dict
        Changes of each patch, by the same path, in the order of the series.
    """

    version: str
    files: dict[str, FileHashes]
    diffs: dict[str, list[FileDiff]]

    def patch(self, name: str, text: bytes) -> bytes:
        """Return file `name` with every patch. `text` is the pristine file.

        Raises PatchError if the result does not have the release's hash.
        """
        for diff in self.diffs[name]:
            text = apply_hunks(text, diff)
        return _checked(name, text, self.files[name].patched)

    def unpatch(self, name: str, text: bytes) -> bytes:
        """Return the pristine file `name`. `text` is the file with every patch.

        Raises PatchError if the result does not have the release's hash.
        """
        for diff in reversed(self.diffs[name]):
            text = apply_hunks(text, diff.reversed())
        return _checked(name, text, self.files[name].original)


def _checked(name: str, text: bytes, wanted: str | None) -> bytes:
    if sha256(text) != wanted:
        raise PatchError(
            f"the patches do not make of {name} what its hash says; nothing was changed; "
            "reinstall sglang-dcp, or export the series again"
        )
    return text


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_of(version: str) -> Path:
    """Return where the series for a version of SGLang is, or will be."""
    return FOLDER / version


def versions() -> list[str]:
    """List the versions of SGLang that have a series, oldest first."""
    return [
        version for version in releases.known_versions() if folder_of(version).is_dir()
    ]


def load_series(version: str) -> Series:
    """Read the series for a version of SGLang and check it by the release's hashes.

    Raises
    ------
    PatchError
        The message names the first file that is missing, changed or not in the hashes.
    """
    return read_folder(folder_of(version), _load_release(version))


def read_folder(folder: Path, release: Release) -> Series:
    """Do `load_series` for a series in another folder, or with hashes not stored yet."""
    names = read_series(folder)
    if names != list(release.patches):
        raise PatchError(
            f"{folder / 'series'} and the release's hashes name other patches; {_AGAIN}"
        )
    diffs: dict[str, list[FileDiff]] = {}
    for name in names:
        for diff in read_patch(name, _read_patch(folder, name, release.patches)):
            diffs.setdefault(_below_package(name, diff.path), []).append(diff)
    files = release.touched()
    if set(files) != set(diffs):
        raise PatchError(
            f"the release's hashes and the patches touch other files: "
            f"{', '.join(sorted(set(files) ^ set(diffs)))}; {_AGAIN}"
        )
    return Series(release.version, files, diffs)


_AGAIN = "reinstall sglang-dcp, or export the series again"


def read_series(folder: Path) -> list[str]:
    """Return the names of the patches, in order."""
    path = folder / "series"
    if not path.is_file():
        raise PatchError(f"{path} is missing; {_AGAIN}")
    return path.read_text().split()


def _load_release(version: str) -> Release:
    path = releases.file_of(version)
    try:
        return releases.load_release(version)
    except UnknownRelease:
        raise PatchError(f"{path} is missing; {_AGAIN}") from None
    except json.JSONDecodeError as error:
        raise PatchError(f"{path} cannot be read: {error}; {_AGAIN}") from None


def _read_patch(folder: Path, name: str, hashes: dict[str, str]) -> bytes:
    path = folder / name
    if not path.is_file():
        raise PatchError(f"{path} is missing; {_AGAIN}")
    data = path.read_bytes()
    if sha256(data) != hashes[name]:
        raise PatchError(f"{path} is not the patch that the release knows; {_AGAIN}")
    return data


def _below_package(patch: str, path: str) -> str:
    """Return `srt/x.py` for `python/sglang/srt/x.py`.

    Raises PatchError for a path outside of the package.
    """
    name = path.removeprefix(PREFIX)
    if name == path or ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise PatchError(f"{patch} touches {path}, which is not below {PREFIX}")
    return name
