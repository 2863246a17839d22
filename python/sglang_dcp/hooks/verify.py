"""Proof that every hook is live and that SGLang's source is known.

SGLang's plugin loader logs a failing hook and starts anyway. With DCP flags that would
serve wrong tokens, so the process ends here instead.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any, Iterable, NamedTuple

from sglang_dcp.config import DcpConfigError
from sglang_dcp.hooks import inline
from sglang_dcp.hooks.table import Hook, Kind, active_hooks, relied_files
from sglang_dcp.releases import UnknownRelease, load_release
from sglang_dcp.releases.installed import sglang_version

logger = logging.getLogger(__name__)

# Changed files that the user accepts, comma separated.
ALLOW_DRIFT = "SGLANG_DCP_ALLOW_DRIFT"
LIVE = ("hooked", "patched")
# Set when a DCP server's arguments arrive in a scheduler process.
_required = False


class HookState(NamedTuple):
    """The state of one hook in this process.

    `state` is one of

    - `hooked`: installed by the plugin,
    - `patched`: in SGLang's source,
    - `not hooked`: not live,
    - `missing`: SGLang has no such target,
    - `drifted`: the target's file is neither the release's nor the one with our patches.
    """

    hook: Hook
    state: str
    file: str


def require_hooks() -> None:
    """Demand that `plugin.load` succeeds in this process from now on."""
    global _required
    _required = True


def hooks_required() -> bool:
    return _required


def target_file(hook: Hook) -> Path:
    """Return the SGLang source file that holds a hook's target.

    Raises
    ------
    ModuleNotFoundError
        The module is gone, and the rest of its path is a folder.
    """
    spec = importlib.util.find_spec(hook.module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module holds {hook.target}")
    return Path(spec.origin)


@functools.cache
def package_root() -> Path:
    """Return the folder of the installed `sglang` package."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hook_states(hooks: Iterable[Hook]) -> list[HookState]:
    """Return the state of each hook in this process.

    Raises DcpConfigError for a version of SGLang that this package does not know.
    """
    known = _known_hashes()
    return [_hook_state(hook, known) for hook in hooks]


def _known_hashes() -> dict[str, set[str]]:
    """Return the known hashes by file: as in the wheel, and with our patches.

    Raises
    ------
    DcpConfigError
        This package does not know the version of SGLang.
    """
    try:
        release = load_release(sglang_version())
    except UnknownRelease as error:
        raise DcpConfigError(str(error)) from None
    return {name: hashes.known() for name, hashes in release.files.items()}


def _is_known(path: Path, name: str, known: dict[str, set[str]]) -> bool:
    """Whether the file has a known hash, or the user accepts it."""
    if path.is_file() and file_hash(path) in known.get(name, ()):
        return True
    if path.is_file() and name in os.environ.get(ALLOW_DRIFT, "").split(","):
        _warn_of_drift(name)
        return True
    return False


@functools.cache
def _warn_of_drift(name: str) -> None:
    logger.warning(
        "DCP: %s is not the file of sglang %s; accepted by %s",
        name,
        sglang_version(),
        ALLOW_DRIFT,
    )


def _hook_state(hook: Hook, known: dict[str, set[str]]) -> HookState:
    try:
        path = target_file(hook)
    except ModuleNotFoundError:
        return HookState(hook, "missing", hook.target)
    name = path.relative_to(package_root()).as_posix()
    if name not in known:
        return HookState(hook, "missing", name)
    if not _is_known(path, name, known):
        return HookState(hook, "drifted", name)
    if not _exists(hook):
        return HookState(hook, "missing", name)
    if not is_live(hook):
        return HookState(hook, "not hooked", name)
    return HookState(hook, "patched" if inline.is_inline(hook) else "hooked", name)


def _exists(hook: Hook) -> bool:
    """Whether SGLang has the target. An attribute or entry need not exist before."""
    if hook.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return True
    try:
        pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    return True


def is_live(hook: Hook) -> bool:
    """Whether the target, looked up now, is ours or wraps the original with ours."""
    if inline.is_inline(hook):
        return _reaches(hook, inline.inline_object(hook))
    if hook.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return look_up(hook) is hook.load()
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = HookRegistry._hooks.get(hook.target, ())
    ours = hook.load()
    registered = any(hook is ours for _, hook, _ in hooks)
    return registered and hook.target in HookRegistry._patched and _reaches(hook, ours)


def _reaches(hook: Hook, ours: Any) -> bool:
    """Whether the target, looked up now, is `ours` or wraps it."""
    found = look_up(hook)
    while found is not None and found is not ours:
        cells = getattr(found, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        found = getattr(found, "__wrapped__", None)
    return found is ours


def look_up(hook: Hook) -> Any:
    """Return what a hook's target holds now, or None."""
    path, _, key = hook.target.rstrip("]").partition("[")
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
    return found.get(key) if key else found


def problems(states: Iterable[HookState]) -> list[str]:
    """Return one line for each hook that is not live, and for a half-patched SGLang."""
    states, version = list(states), sglang_version()
    lines = {
        "drifted": "{file} is not the file of sglang {version} that hook {name} knows",
        "missing": "{target} does not exist (hook {name})",
        "not hooked": "{target} is not hooked (hook {name}); is the sglang_dcp plugin "
        "allowed by SGLANG_PLUGINS?",
    }
    faults = [
        lines[s.state].format(
            file=s.file, version=version, name=s.hook.name, target=s.hook.target
        )
        for s in states
        if s.state not in LIVE
    ]
    if {s.state for s in states} >= set(LIVE):
        faults.append(
            "SGLang is half patched; run python -m sglang_dcp patch apply, or patch revert"
        )
    return faults


def drifted_reliances() -> list[str]:
    """Return one line for each file of `relied_files` that is not known."""
    return [
        f"{name} is not the file of sglang {sglang_version()} that DCP was written against"
        for name in _drifted(relied_files())
    ]


def _drifted(names: Iterable[str]) -> list[str]:
    known = _known_hashes()
    return [name for name in names if not _is_known(package_root() / name, name, known)]


def verify_hooks() -> None:
    """Raise unless every hook of this machine is live on known source.

    Raises
    ------
    DcpConfigError
        The message names each hook and file at fault, and what to do.
    """
    states = hook_states(active_hooks())
    found = problems(states) + drifted_reliances()
    if not found:
        return
    version = sglang_version()
    drifted = {state.file for state in states if state.state == "drifted"}
    drifted.update(_drifted(relied_files()))
    raise DcpConfigError(
        f"cannot run with DCP on this SGLang: {'; '.join(found)}. Reinstall "
        f"sglang=={version} unchanged, or run without DCP flags{_drift_hint(drifted)}"
    )


def _drift_hint(drifted: set[str]) -> str:
    if not drifted:
        return ""
    names = ",".join(sorted(drifted))
    return f". If you know that the changes are harmless, set {ALLOW_DRIFT}={names}"


def exit_unless_verified() -> None:
    """Run `verify_hooks` in a scheduler process, and end the process if it fails."""
    try:
        verify_hooks()
    except DcpConfigError as error:
        sys.exit(f"sglang-dcp: error: {error}")
