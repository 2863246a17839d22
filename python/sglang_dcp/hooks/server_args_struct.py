"""`ServerArgs` with the DCP flags, for releases in which it is a record (0.5.23).

The record keeps what the user asked for. SGLang resolves it once, and every decision is
declared beside it. With DCP on, the first decision is that SGLang's own `dcp_size` is 1.
Otherwise its models, pools and allocators would divide slots by `dcp_size` a second time.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any, Callable

import msgspec

from sglang_dcp.hooks import server_args
from sglang_dcp.hooks.server_args_fields import dcp_fields
from sglang_dcp.releases.api import sglang_api


def extend_struct(base: Any, module: str, name: str) -> Any:
    """Make a subclass of the record `base`. `extend_server_args` has the details."""
    from sglang.srt.arg_groups.arg_utils import NS

    def __post_init__(self: Any) -> None:
        """Without a DCP flag, give `dcp_size` its value in SGLang already now."""
        base.__post_init__(self)
        if self.dcp_size is None and self.attn_tp_size is None:
            self.dcp_size = 1

    def resolve_once(self: Any) -> None:
        """Resolve once. With DCP on, check before and after SGLang's own resolution.

        Every process that gets these arguments calls it again. So it also ends one in which
        the plugin does not load, which no hook could notice.
        """
        if _was_resolved(self):
            if self.dcp is not None:
                server_args.exit_without_plugin()
            base.resolve_once(self)
            return
        cli = getattr(self, "_dcp_from_cli", False)
        with server_args.exit_on_error() if cli else nullcontext():
            _resolve(self, base.resolve_once)

    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        """Build from the command line. An error of `resolve_once` then exits with 2."""
        record = base.from_cli_args.__func__(cls, args)
        record._dcp_from_cli = True
        return record

    def resolved_dict(self: Any) -> dict[str, Any]:
        """Return the resolved arguments, with the user's layout for `/server_info`."""
        return base.resolved_dict(self) | _shown(self)

    def __reduce__(self: Any) -> Any:
        return _rebuild, base.__reduce__(self)

    namespace = {
        "dcp": property(server_args.config_of),
        "__post_init__": __post_init__,
        "resolve_once": resolve_once,
        "from_cli_args": classmethod(from_cli_args),
        "resolved_dict": resolved_dict,
        "__reduce__": __reduce__,
    }
    return msgspec.defstruct(
        name,
        [tuple(field) for field in dcp_fields(NS("dcp"))],
        bases=(base,),
        module=module,
        namespace=namespace,
        dict=True,
    )


def _was_resolved(args: Any) -> bool:
    return getattr(args, "_resolution_finished", False) or getattr(
        args, "_resolution_failed", False
    )


def _resolve(args: Any, original: Callable[[Any], None]) -> None:
    asked = server_args.resolve(args)
    server_args.set_config(args, asked)
    if asked is None:
        if args.dcp_size is None:
            args.dcp_size = 1
        original(args)
        return
    sglang_api().declare(
        args,
        "dcp.own_dcp_off",
        dcp_size=1,
        dcp_comm_backend="ag_rs",
        dcp_replicate_q_proj=False,
    )
    try:
        server_args.prepare(args)
        original(args)
        server_args.finish(args)
    except BaseException:
        # SGLang then refuses to resolve this record again, as after an error of its own.
        args._resolution_finished, args._resolution_failed = False, True
        raise


def _shown(args: Any) -> dict[str, Any]:
    if args.dcp is None:
        return {}
    return {
        "dcp_size": args.dcp.dcp_size,
        "attn_tp_size": args.dcp.attn_tp_size,
        "dcp_comm_backend": args.dcp.comm_backend,
        "dcp_replicate_q_proj": args.dcp.replicate_q_proj,
        # No field: so nobody can take these arguments, whose pages are logical, for new
        # ones, whose pages would be multiplied again.
        "dcp_page_size": args.dcp.page_size,
    }


def _rebuild(rebuild: Callable[..., Any], state: tuple[Any, ...]) -> Any:
    """Unpickle in another process. From now on a missing hook ends that process."""
    record = rebuild(*state)
    server_args.require_hooks_of(record)
    return record
