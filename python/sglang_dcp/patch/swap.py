"""Replaces all of several files or none, by renaming new files into place.

Files are never written in place, because package managers link one file into many
environments. After a kill each file is wholly old or wholly new. Its hash shows which, so
the next run needs no journal.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from sglang_dcp.patch.error import PatchError

# A fixed name, so that the next run finds and removes the files of a killed run.
SUFFIX = ".sglang-dcp-new"


class Change(NamedTuple):
    """The old and the new content of one file."""

    old: bytes
    new: bytes


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Lock `root` against other runs. The lock ends with the process, even if killed.

    Raises PatchError if another run holds the lock.
    """
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PatchError(f"another run is at work on {root}; wait for it") from None
    finally:
        os.close(handle)


def leftovers(root: Path, names: Iterable[str]) -> list[Path]:
    """List new files that a killed run did not rename."""
    paths = [_new_path(root / name) for name in names]
    return [path for path in paths if path.exists()]


def replace_all(root: Path, changes: dict[str, Change]) -> None:
    """Replace every file, or none if one of them cannot be replaced.

    Raises
    ------
    PatchError
        A file cannot be written, or it changed since it was read.
    """
    done: list[str] = []
    try:
        for name, change in changes.items():
            _write_new(root / name, change.new)
        for name, change in changes.items():
            _rename(root / name, change.old)
            done.append(name)
    except OSError as error:
        raise PatchError(
            f"{error.filename}: {error.strerror}; nothing was changed; run as the owner "
            "of the environment, or leave SGLang as it is and use the plugin"
        ) from error
    finally:
        if len(done) < len(changes):
            _undo(root, changes, done)


def _undo(root: Path, changes: dict[str, Change], done: list[str]) -> None:
    for path in leftovers(root, changes):
        path.unlink()
    for name in done:
        _write_new(root / name, changes[name].old)
        os.replace(_new_path(root / name), root / name)


def _new_path(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _write_new(path: Path, data: bytes) -> None:
    """Write the new file beside `path` to disk, with the mode and owner of `path`."""
    like = path.stat()
    handle = os.open(_new_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        if os.geteuid() == 0:
            os.fchown(handle, like.st_uid, like.st_gid)
        os.fchmod(handle, stat.S_IMODE(like.st_mode))
        file.flush()
        os.fsync(handle)


def _rename(path: Path, old: bytes) -> None:
    if path.read_bytes() != old:
        raise PatchError(f"{path} changed meanwhile; no file was patched; try again")
    os.replace(_new_path(path), path)
