"""Proof that every seam is live and SGLang's source is the one that we know.

SGLang's plugin loader logs a failing hook and starts anyway. With a DCP flag set that
would serve wrong tokens, so the process ends here instead.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from sglang_dcp import patched
from sglang_dcp.config import DcpConfigError
from sglang_dcp.patch.manifest import patched_hashes
from sglang_dcp.seams import RELIES_ON, Kind, Seam, active_seams

_MANIFESTS = Path(__file__).parent / "manifests"
LIVE = ("hooked", "patched")
# Set where a DCP server's arguments arrive in a scheduler process.
_required = False


class SeamState(NamedTuple):
    """One seam as found in this process.

    `state` is `hooked` (by the plugin), `patched` (in SGLang's source), `not hooked`,
    `missing` (no such target) or `drifted` (the file that holds the target is neither
    the one in the manifest nor that file with our patches).
    """

    seam: Seam
    state: str
    file: str


def require_seams() -> None:
    """From now on `plugin.load` in this process must succeed."""
    global _required
    _required = True


def seams_required() -> bool:
    return _required


def sglang_version() -> str:
    """Version of the installed SGLang."""
    from importlib.metadata import version

    return version("sglang")


def load_manifest(version: str) -> dict[str, str]:
    """Known sha256 by file, relative to the `sglang` package.

    Raises
    ------
    DcpConfigError
        For a version that this package does not know.
    """
    path = _MANIFESTS / f"{version}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in _MANIFESTS.glob("*.json")))
        raise DcpConfigError(
            f"sglang {version} is not known to this sglang-dcp (known: {known}); "
            f"install sglang=={known.split(', ')[-1]}, or run without DCP flags"
        )
    return json.loads(path.read_text())["files"]


def seam_file(seam: Seam) -> Path:
    """The SGLang source file that holds a seam's target.

    Raises
    ------
    ModuleNotFoundError
        For a module that is gone: what is left of its path is a folder.
    """
    spec = importlib.util.find_spec(seam.module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module holds {seam.target}")
    return Path(spec.origin)


@functools.cache
def package_root() -> Path:
    """Folder of the installed `sglang` package."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seam_states(seams: Iterable[Seam]) -> list[SeamState]:
    """State of each seam in this process."""
    known = _known_hashes()
    return [_seam_state(seam, known) for seam in seams]


def _known_hashes() -> dict[str, set[str]]:
    """By file: that of the wheel, and that of the wheel with our patches."""
    version = sglang_version()
    known = {name: {sha} for name, sha in load_manifest(version).items()}
    for name, sha in patched_hashes(version).items():
        known.setdefault(name, set()).add(sha)
    return known


def _seam_state(seam: Seam, known: dict[str, set[str]]) -> SeamState:
    try:
        path = seam_file(seam)
    except ModuleNotFoundError:
        return SeamState(seam, "missing", seam.target)
    name = path.relative_to(package_root()).as_posix()
    if name not in known:
        return SeamState(seam, "missing", name)
    if file_hash(path) not in known[name]:
        return SeamState(seam, "drifted", name)
    if not _exists(seam):
        return SeamState(seam, "missing", name)
    if not is_live(seam):
        return SeamState(seam, "not hooked", name)
    return SeamState(seam, "patched" if patched.provided(seam) else "hooked", name)


def _exists(seam: Seam) -> bool:
    """Whether SGLang has the target, or it is one that only we provide."""
    if seam.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return True
    try:
        pkgutil.resolve_name(seam.target)
    except (ImportError, AttributeError):
        return False
    return True


def is_live(seam: Seam) -> bool:
    """Whether the target, looked up now, is ours or wraps the original with ours."""
    if patched.provided(seam):
        return _reaches(seam, patched.placed(seam))
    if seam.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return look_up(seam) is seam.load()
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = HookRegistry._hooks.get(seam.target, ())
    ours = seam.load()
    registered = any(hook is ours for _, hook, _ in hooks)
    return registered and seam.target in HookRegistry._patched and _reaches(seam, ours)


def _reaches(seam: Seam, ours: Any) -> bool:
    """Whether the target, looked up now, is `ours` or still wraps it."""
    found = look_up(seam)
    while found is not None and found is not ours:
        cells = getattr(found, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        found = getattr(found, "__wrapped__", None)
    return found is ours


def look_up(seam: Seam) -> Any:
    """What a seam's target holds now, or None."""
    path, _, key = seam.target.rstrip("]").partition("[")
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    return found.get(key) if key else found


def problems(states: Iterable[SeamState]) -> list[str]:
    """One line for each seam that is not live, or for a half-patched SGLang."""
    states, version = list(states), sglang_version()
    lines = {
        "drifted": "{file} is not the file of sglang {version} that seam {name} knows",
        "missing": "{target} does not exist (seam {name})",
        "not hooked": "{target} is not hooked (seam {name}); is the sglang_dcp plugin "
        "allowed by SGLANG_PLUGINS?",
    }
    faults = [
        lines[s.state].format(
            file=s.file, version=version, name=s.seam.name, target=s.seam.target
        )
        for s in states
        if s.state not in LIVE
    ]
    if {s.state for s in states} >= set(LIVE):
        faults.append(
            "SGLang is half patched; run python -m sglang_dcp patch apply, or revert"
        )
    return faults


def drifted_reliances() -> list[str]:
    """One line for each file of `RELIES_ON` that is not the known one."""
    known, version = _known_hashes(), sglang_version()
    return [
        f"{name} is not the file of sglang {version} that DCP was written against"
        for name in RELIES_ON
        if not (package_root() / name).is_file()
        or file_hash(package_root() / name) not in known.get(name, ())
    ]


def verify_seams() -> None:
    """Raise unless every seam of this machine is live on known source.

    Raises
    ------
    DcpConfigError
        Naming each seam that is not, and what to do.
    """
    found = problems(seam_states(active_seams())) + drifted_reliances()
    if found:
        raise DcpConfigError(
            "cannot run with DCP on this SGLang: "
            + "; ".join(found)
            + ". Reinstall sglang=="
            + sglang_version()
            + " unchanged, or run without DCP flags"
        )


def exit_unless_verified() -> None:
    """`verify_seams` for a scheduler process: ends it with the reason."""
    try:
        verify_seams()
    except DcpConfigError as error:
        sys.exit(f"sglang-dcp: error: {error}")
