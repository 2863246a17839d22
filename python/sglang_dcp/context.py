"""The one set-once value of a scheduler process: its layout and place in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from sglang_dcp.config import DcpConfig


@dataclass(frozen=True)
class DcpContext:
    """A scheduler process's view of the layout.

    Attributes
    ----------
    config : DcpConfig
    tp_rank : int
        Rank within the tensor-parallel group of this replica.
    """

    config: DcpConfig
    tp_rank: int

    @property
    def kvp_rank(self) -> int:
        return self.config.layout.kvp_rank(self.tp_rank)

    @property
    def attn_tp_rank(self) -> int:
        return self.config.layout.attn_tp_rank(self.tp_rank)


_CONTEXT: Optional[DcpContext] = None


def set_context(context: DcpContext) -> None:
    """Publish the process's context; a second, different one is a bug."""
    global _CONTEXT
    if _CONTEXT is not None and _CONTEXT != context:
        raise RuntimeError(f"DCP context is already {_CONTEXT}, got {context}")
    _CONTEXT = context


def get_context() -> DcpContext:
    """The process's context.

    Raises
    ------
    RuntimeError
        Where DCP is off or the scheduler process has not been configured yet.
    """
    if _CONTEXT is None:
        raise RuntimeError("DCP is off in this process: no context was set")
    return _CONTEXT


def find_context() -> Optional[DcpContext]:
    """The process's context, or None where DCP is off or no scheduler runs."""
    return _CONTEXT


def clear_context() -> None:
    """Forget the context (tests, engine shutdown)."""
    global _CONTEXT
    _CONTEXT = None
