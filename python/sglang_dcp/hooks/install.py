"""Installs every hook of the table that SGLang's source does not already hold.

SGLang calls `load` before it parses arguments and first in every scheduler process.
"""

from __future__ import annotations

import logging
import pkgutil
import sys

from sglang_dcp.hooks import inline, unknown_release
from sglang_dcp.hooks.table import Hook, Kind, active_hooks
from sglang_dcp.hooks.verify import hooks_required
from sglang_dcp.releases import UnknownRelease, load_release
from sglang_dcp.releases.installed import sglang_version

logger = logging.getLogger(__name__)

# Errors of looking up a target that SGLang has moved.
_ABSENT = (ImportError, AttributeError, KeyError)
_loaded = False


def is_loaded() -> bool:
    """Whether `load` has installed what it could in this process."""
    return _loaded


def load() -> None:
    """Install every hook of the table.

    Hooks that a patched SGLang holds in its source are skipped. So is a hook that cannot
    be installed. The server then rejects DCP flags (`verify.verify_hooks`), and starts
    without them. For an unknown release of SGLang, only the DCP flags are rejected.

    Raises
    ------
    SystemExit
        A hook cannot be installed in a scheduler process of a DCP server.
    """
    global _loaded
    try:
        load_release(sglang_version())
    except UnknownRelease as error:
        unknown_release.reject_flags(str(error))
        return
    for hook in active_hooks():
        try:
            _install(hook)
        except _ABSENT as error:
            if hooks_required():
                sys.exit(f"sglang-dcp: error: hook {hook.name}: {error}")
            logger.debug("hook %s was not installed: %s", hook.name, error)
    _loaded = True


def _install(hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if inline.is_inline(hook):
        return
    if hook.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        _assign(hook)
    else:
        HookRegistry.register(hook.target, hook.load(), HookType(hook.kind.value))


def _assign(hook: Hook) -> None:
    ours = hook.load()
    if hook.kind is Kind.ENTRY:
        path, key = hook.target.rstrip("]").split("[")
        pkgutil.resolve_name(path)[key] = ours
        return
    path, _, name = hook.target.rpartition(".")
    setattr(pkgutil.resolve_name(path), name, ours)
