"""The one set-once value of a scheduler process: its layout and its rank in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.nodes import Node


@dataclass(frozen=True)
class DcpContext:
    """The layout, and the rank of this scheduler process in it.

    Attributes
    ----------
    config : DcpConfig
    tp_rank : int
        Rank in the pool of `config.layout`: in the tensor-parallel group, or with DP
        attention in this replica's part of it.
    node : Node, optional
        The node of this process; None if there is one node only.
    """

    config: DcpConfig
    tp_rank: int
    node: Optional[Node] = None

    @property
    def dcp_rank(self) -> int:
        return self.config.layout.dcp_rank(self.tp_rank)

    @property
    def attn_tp_rank(self) -> int:
        return self.config.layout.attn_tp_rank(self.tp_rank)


_CONTEXT: Optional[DcpContext] = None


def set_context(context: DcpContext) -> None:
    """Set the process's context. Raises RuntimeError if it has a different one already."""
    global _CONTEXT
    if _CONTEXT is not None and _CONTEXT != context:
        raise RuntimeError(f"DCP context is already {_CONTEXT}, got {context}")
    _CONTEXT = context


def get_context() -> DcpContext:
    """Return the process's context.

    Raises
    ------
    RuntimeError
        DCP is off, or the scheduler process is not configured yet.
    """
    if _CONTEXT is None:
        raise RuntimeError("DCP is off in this process: no context was set")
    return _CONTEXT


def find_context() -> Optional[DcpContext]:
    """Return the process's context, or None with DCP off or outside of a scheduler."""
    return _CONTEXT


def clear_context() -> None:
    """Clear the context, for tests and engine shutdown."""
    global _CONTEXT
    _CONTEXT = None
