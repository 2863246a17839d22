"""A series on disk: `series`, the patches, and `UPSTREAM.json` with every hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.unified import FileDiff, apply_hunks, read_patch

# In a checkout a link to its `patches/`, in an installed wheel the files.
FOLDER = Path(__file__).parent.parent / "patches"
PREFIX = "python/sglang/"
NAME = "UPSTREAM.json"


class Hashes(NamedTuple):
    """sha256 of a file of SGLang without and with the whole series."""

    before: str
    after: str


class Series(NamedTuple):
    """A series whose files are what its manifest says.

    Attributes
    ----------
    version : str
        Of SGLang.
    files : dict
        By path below the `sglang` package.
    diffs : dict
        By the same path: what each patch does to it, in the order of the series.
    """

    version: str
    files: dict[str, Hashes]
    diffs: dict[str, list[FileDiff]]

    def patch(self, name: str, text: bytes) -> bytes:
        """File `name` with every patch; `text` is the pristine one."""
        for diff in self.diffs[name]:
            text = apply_hunks(text, diff)
        return _checked(name, text, self.files[name].after)

    def unpatch(self, name: str, text: bytes) -> bytes:
        """File `name` as pristine; `text` has every patch."""
        for diff in reversed(self.diffs[name]):
            text = apply_hunks(text, diff.reversed())
        return _checked(name, text, self.files[name].before)


def _checked(name: str, text: bytes, wanted: str) -> bytes:
    if sha256(text) != wanted:
        raise PatchError(
            f"the patches do not make of {name} what {NAME} says; nothing was changed; "
            "reinstall sglang-dcp, or export the series again"
        )
    return text


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def folder_of(version: str) -> Path:
    """Where the series for a version of SGLang is, or will be."""
    return FOLDER / version


def versions() -> list[str]:
    """Versions of SGLang for which there is a series."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{NAME}"))


def patched_hashes(version: str) -> dict[str, str]:
    """sha256 by file of a patched SGLang; empty where there is no series."""
    path = folder_of(version) / NAME
    if not path.is_file():
        return {}
    files = json.loads(path.read_text())["files"]
    return {name: hashes["after"] for name, hashes in files.items()}


def load_series(folder: Path) -> Series:
    """Read a series and prove that it is the one of its manifest.

    Raises
    ------
    PatchError
        Naming the first file that is missing, changed, or not accounted for.
    """
    manifest = _read_manifest(folder)
    names = read_series(folder)
    if names != list(manifest["patches"]):
        raise PatchError(f"{folder / 'series'} and {NAME} name other patches; {_AGAIN}")
    diffs: dict[str, list[FileDiff]] = {}
    for name in names:
        for diff in read_patch(name, _read_patch(folder, name, manifest["patches"])):
            diffs.setdefault(_below_package(name, diff.path), []).append(diff)
    files = {name: Hashes(**hashes) for name, hashes in manifest["files"].items()}
    if set(files) != set(diffs):
        raise PatchError(
            f"{NAME} and the patches touch other files: "
            f"{', '.join(sorted(set(files) ^ set(diffs)))}; {_AGAIN}"
        )
    return Series(manifest["sglang"], files, diffs)


_AGAIN = "reinstall sglang-dcp, or export the series again"


def read_series(folder: Path) -> list[str]:
    """Names of the patches, in order."""
    path = folder / "series"
    if not path.is_file():
        raise PatchError(f"{path} is missing; {_AGAIN}")
    return path.read_text().split()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise PatchError(f"{path} is missing; {_AGAIN}") from None
    except json.JSONDecodeError as error:
        raise PatchError(f"{path} cannot be read: {error}; {_AGAIN}") from None
    return manifest


def _read_patch(folder: Path, name: str, hashes: dict[str, str]) -> bytes:
    path = folder / name
    if not path.is_file():
        raise PatchError(f"{path} is missing; {_AGAIN}")
    data = path.read_bytes()
    if sha256(data) != hashes[name]:
        raise PatchError(f"{path} is not the patch that {NAME} knows; {_AGAIN}")
    return data


def _below_package(patch: str, path: str) -> str:
    """`srt/x.py` of `python/sglang/srt/x.py`; nothing outside of the package."""
    name = path.removeprefix(PREFIX)
    if name == path or ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise PatchError(f"{patch} touches {path}, which is not below {PREFIX}")
    return name
