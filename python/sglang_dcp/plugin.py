"""Entry point of the group `sglang.srt.plugins`: puts every seam in place.

SGLang calls `load` before it parses arguments and first in every scheduler process.
"""

from __future__ import annotations

import logging
import pkgutil
import sys

from sglang_dcp import patched
from sglang_dcp.seams import Kind, Seam, active_seams
from sglang_dcp.verify import seams_required

logger = logging.getLogger(__name__)

# A seam whose target moved away: what looking it up can raise.
_ABSENT = (ImportError, AttributeError, KeyError)


def load() -> None:
    """Register the hooks and make the assignments of the seam table.

    What a patched SGLang holds in its own source is left alone.
    A seam that cannot be placed is left: the server refuses DCP flags with it
    (`verify.verify_seams`), and starts without them.

    Raises
    ------
    SystemExit
        In a scheduler process of a DCP server, where nothing may be missing.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in active_seams():
        try:
            if patched.provided(seam):
                continue
            if seam.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
                _assign(seam)
            else:
                HookRegistry.register(
                    seam.target, seam.load(), HookType(seam.kind.value)
                )
        except _ABSENT as error:
            if seams_required():
                sys.exit(f"sglang-dcp: error: seam {seam.name}: {error}")
            logger.debug("seam %s was not placed: %s", seam.name, error)


def _assign(seam: Seam) -> None:
    ours = seam.load()
    if seam.kind is Kind.ENTRY:
        path, key = seam.target.rstrip("]").split("[")
        pkgutil.resolve_name(path)[key] = ours
        return
    path, _, name = seam.target.rpartition(".")
    setattr(pkgutil.resolve_name(path), name, ours)
