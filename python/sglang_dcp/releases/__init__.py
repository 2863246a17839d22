"""The known SGLang releases: one JSON file of hashes for each release.

A JSON file names the release's wheel and the patches of its series. For every file of
SGLang that this package hooks, patches or relies on, it has the sha256 of the original. If
the series changes the file, it also has that of the patched form.

This module imports only the standard library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional

from sglang_dcp.releases.installed import by_number

FOLDER = Path(__file__).parent


class FileHashes(NamedTuple):
    """The sha256 of one file of SGLang. `patched` is None if no patch touches it."""

    original: str
    patched: Optional[str] = None

    def known(self) -> set[str]:
        """Return every hash that the file may have."""
        return {sha for sha in self if sha is not None}


class Release(NamedTuple):
    """One SGLang release.

    Attributes
    ----------
    version : str
    files : dict
        Hashes of each file, by path below the `sglang` package.
    patches : dict
        sha256 of each patch, by name, in the order of the series.
    wheel : dict
        `name` and `sha256` of the wheel from which the patches were made.
    """

    version: str
    files: dict[str, FileHashes]
    patches: dict[str, str]
    wheel: dict[str, str]

    def touched(self) -> dict[str, FileHashes]:
        """Return the files that the patch series changes."""
        return {name: sha for name, sha in self.files.items() if sha.patched}


class UnknownRelease(LookupError):
    """There is no JSON file for that version of SGLang."""


def file_of(version: str) -> Path:
    """Return where the JSON file of a version is, or will be."""
    return FOLDER / f"{version}.json"


def known_versions() -> list[str]:
    """List the versions of SGLang that have a JSON file, oldest first."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=by_number)


def load_release(version: str) -> Release:
    """Read the JSON file of `version`.

    Raises
    ------
    UnknownRelease
        There is none. The message names the version and the known ones.
    """
    path = file_of(version)
    if not path.is_file():
        known = known_versions()
        raise UnknownRelease(
            f"sglang {version} is not known to this sglang-dcp (known: "
            f"{', '.join(known)}); install sglang=={known[-1]}, or run without DCP flags"
        )
    data: dict[str, Any] = json.loads(path.read_text())
    files = {name: FileHashes(**hashes) for name, hashes in data["files"].items()}
    return Release(data["sglang"], files, data["patches"], data["wheel"])


def write_release(release: Release) -> Path:
    """Write the JSON file of a release and return its path."""
    files = {
        name: {"original": sha.original}
        | ({"patched": sha.patched} if sha.patched else {})
        for name, sha in sorted(release.files.items())
    }
    data = {
        "sglang": release.version,
        "wheel": release.wheel,
        "patches": release.patches,
        "files": files,
    }
    path = file_of(release.version)
    path.write_text(json.dumps(data, indent=2) + "\n")
    return path
