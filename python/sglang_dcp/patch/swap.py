"""Files replaced all or none, by new files renamed into their place.

Never written in place: package managers link one file into many environments. After a
kill each file is wholly old or wholly new, which its hash tells, so the next run needs
no journal to go on or back.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from sglang_dcp.patch.error import PatchError

# One fixed name a file, so that what a killed run left is found and removed.
SUFFIX = ".sglang-dcp-new"


class Change(NamedTuple):
    """One file: what it holds and what it shall hold."""

    old: bytes
    new: bytes


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """No other run works below `root` meanwhile; a killed one gives the lock back."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PatchError(f"another run is at work on {root}; wait for it") from None
    finally:
        os.close(handle)


def leftovers(root: Path, names: Iterable[str]) -> list[Path]:
    """New files that a killed run did not come to rename."""
    paths = [_new_path(root / name) for name in names]
    return [path for path in paths if path.exists()]


def replace_all(root: Path, changes: dict[str, Change]) -> None:
    """Replace every file, or none where one of them cannot be.

    Raises
    ------
    PatchError
        For a file that cannot be written, or that changed since it was read.
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
    """The new file beside `path`, on disk, with its mode and owner."""
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
        raise PatchError(f"{path} changed while it was patched; nothing was; try again")
    os.replace(_new_path(path), path)
