"""`ServerArgs` with the DCP flags, for releases in which it is a dataclass (0.5.16).

SGLang's own `dcp_size` is 1 while it resolves its arguments, and in every scheduler.
Otherwise its models, pools and allocators would divide slots by `dcp_size` a second time.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Optional

from sglang_dcp.config import DcpConfigError
from sglang_dcp.hooks import server_args
from sglang_dcp.hooks.server_args_fields import dcp_fields

# Page size of a rank, set once `page_size` is logical. It has no flag.
_RANK_PAGE = "dcp_page_size"


def extend_dataclass(base: Any, module: str, name: str) -> Any:
    """Make a subclass of the dataclass `base`. `extend_server_args` has the details."""

    def __post_init__(self: Any) -> None:
        _reject_resolved(self)
        asked = server_args.resolve(self)
        server_args.set_config(self, asked)
        self.dcp_size = 1
        self.dcp_comm_backend = asked.comm_backend if asked else None
        self.dcp_replicate_q_proj = bool(asked and asked.replicate_q_proj)
        if asked is None:
            base.__post_init__(self)
            return
        server_args.prepare(self)
        base.__post_init__(self)
        server_args.finish(self)
        _show_sizes(self)

    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        """Build from the command line. An error prints one line and exits with 2."""
        with server_args.exit_on_error():
            return base.from_cli_args.__func__(cls, args)

    def post_capture_kv_sizing_planned(self: Any) -> bool:
        """Return False with DCP on: the resize takes one rank's tokens for logical ones.

        Every scheduler calls it. So it also ends a scheduler in which no hook of ours ran,
        which no hook could notice.
        """
        if self.dcp is None:
            return bool(base.post_capture_kv_sizing_planned(self))
        server_args.exit_without_plugin()
        return False

    def _get_default_attn_backend(
        self: Any, use_mla_backend: bool, model_config: Any
    ) -> str:
        return server_args.default_attn_backend(
            lambda *args: base._get_default_attn_backend(*args),
            self,
            use_mla_backend,
            model_config,
        )

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        """Unpickle in a scheduler. From now on a missing hook ends the process."""
        self.__dict__.update(state)
        server_args.require_hooks_of(self)

    namespace = {
        "dcp": property(server_args.config_of),
        "__post_init__": __post_init__,
        "from_cli_args": classmethod(from_cli_args),
        "post_capture_kv_sizing_planned": post_capture_kv_sizing_planned,
        "_get_default_attn_backend": _get_default_attn_backend,
        "__setstate__": __setstate__,
    }
    marker = (_RANK_PAGE, Optional[int], dataclasses.field(default=None))
    fields = [*map(_spec, dcp_fields()), marker]
    extended = dataclasses.make_dataclass(
        name, fields, bases=(base,), namespace=namespace
    )
    extended.__module__ = module
    return extended


def _spec(field: Any) -> tuple[str, Any, Any]:
    return field.name, field.annotation, dataclasses.field(default=field.default)


def _reject_resolved(args: Any) -> None:
    """Raise DcpConfigError for what `dataclasses.asdict` made of resolved arguments.

    Their pages are logical, and would be multiplied a second time.
    """
    rank_page = getattr(args, _RANK_PAGE)
    if rank_page is not None:
        raise DcpConfigError(
            f"page_size {args.page_size}: these server arguments were resolved before, "
            f"from page_size {rank_page}; start from the arguments that you gave then"
        )


def _show_sizes(args: Any) -> None:
    """Show the layout in the log and in `/server_info`. Schedulers hide `dcp_size` again."""
    if args.dcp is not None:
        args.override(
            "dcp.layout",
            dcp_size=args.dcp.dcp_size,
            attn_tp_size=args.dcp.attn_tp_size,
            dcp_page_size=args.dcp.page_size,
        )
