"""Installs every hook of the table that SGLang's source does not already hold.

SGLang calls `load` before it parses arguments and first in every scheduler process.
"""

from __future__ import annotations

import logging
import pkgutil
import sys

from sglang_dcp.hooks import inline
from sglang_dcp.hooks.table import Hook, Kind, active_hooks
from sglang_dcp.hooks.verify import hooks_required

logger = logging.getLogger(__name__)

# Errors of looking up a target that SGLang has moved.
_ABSENT = (ImportError, AttributeError, KeyError)


def load() -> None:
    """Install every hook of the table.

    Hooks that a patched SGLang holds in its source are skipped. So is a hook that cannot
    be installed. The server then rejects DCP flags (`verify.verify_hooks`), and starts
    without them.

    Raises
    ------
    SystemExit
        A hook cannot be installed in a scheduler process of a DCP server.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in active_hooks():
        try:
            if inline.is_inline(hook):
                continue
            if hook.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
                _assign(hook)
            else:
                HookRegistry.register(
                    hook.target, hook.load(), HookType(hook.kind.value)
                )
        except _ABSENT as error:
            if hooks_required():
                sys.exit(f"sglang-dcp: error: hook {hook.name}: {error}")
            logger.debug("hook %s was not installed: %s", hook.name, error)


def _assign(hook: Hook) -> None:
    ours = hook.load()
    if hook.kind is Kind.ENTRY:
        path, key = hook.target.rstrip("]").split("[")
        pkgutil.resolve_name(path)[key] = ours
        return
    path, _, name = hook.target.rpartition(".")
    setattr(pkgutil.resolve_name(path), name, ours)
