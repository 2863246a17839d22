"""Rejects the DCP flags on a release of SGLang that this package does not know.

No hook is installed there. SGLang has a `--dcp-size` of its own, which would be taken for
ours, so it is rejected too.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable

from sglang_dcp.config import DcpConfigError

_FLAGS = (
    "--dcp-size",
    "--decode-context-parallel-size",
    "--attn-tp-size",
    "--attention-tensor-parallel-size",
    "--dcp-comm-backend",
    "--dcp-replicate-q-proj",
    "--no-dcp-replicate-q-proj",
)
_ARGUMENTS = ("dcp_size", "attn_tp_size", "dcp_comm_backend", "dcp_replicate_q_proj")

_OWN_DCP = "; for SGLang's own DCP uninstall sglang-dcp, or list other SGLANG_PLUGINS"


def reject_flags(reason: str) -> None:
    """Make the command line and `sgl.Engine` reject the DCP flags with `reason`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    targets: dict[str, Callable[..., None]] = {
        "sglang.srt.server_args.prepare_server_args": check_command_line,
        "sglang.srt.entrypoints.engine.Engine.__init__": check_engine,
    }
    for target, check in targets.items():
        HookRegistry.register(target, functools.partial(check, reason), HookType.BEFORE)


def check_command_line(reason: str, argv: list[str], *args: Any, **kwargs: Any) -> None:
    """Exit with 2 if `argv` has one of our flags."""
    given = [word for word in argv if word.split("=")[0] in _FLAGS]
    if given:
        print(f"sglang-dcp: error: {given[0]}: {reason}{_OWN_DCP}", file=sys.stderr)
        sys.exit(2)


def check_engine(reason: str, engine: Any, *args: Any, **kwargs: Any) -> None:
    """Raise DcpConfigError if `sgl.Engine` gets one of our arguments."""
    given = [name for name in _ARGUMENTS if kwargs.get(name) is not None]
    if getattr(kwargs.get("server_args"), "dcp_size", None) not in (None, 1):
        given.append("dcp_size")
    if given:
        raise DcpConfigError(f"{given[0]}: {reason}{_OWN_DCP}")
