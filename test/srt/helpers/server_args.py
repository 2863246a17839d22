"""SGLang's `ServerArgs` in a test process, in either of its forms."""

from __future__ import annotations

import dataclasses
from typing import Any

from helpers.parallel import attention_width
from sglang_dcp.hooks import scheduler


def resolve_server_args(args: Any) -> Any:
    """Resolve `args` where its constructor did not, as launchers do. Return `args`."""
    resolve = getattr(args, "resolve_once", None)
    if resolve is not None:
        resolve()
    return args


def as_server_info(args: Any) -> dict[str, Any]:
    """What `/server_info` starts from."""
    if dataclasses.is_dataclass(args):
        return dataclasses.asdict(args)  # type: ignore[arg-type]
    return dict(args.resolved_dict())


def configure_scheduler(args: Any, rank: int) -> None:
    """The first hook of a scheduler process, called as each release calls it."""
    with attention_width(args.tp_size, rank):
        scheduler.configure_scheduler_process(args, 0, rank)
