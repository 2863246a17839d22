"""A door in what keeps prefill graphs off with DCP on GPUs.

DCP turns them off until GPU servers have shown them right. The plugin of such a server
opens that door in its processes only.
"""

from __future__ import annotations

from helpers.doors import with_door

OPENED = frozenset({"fa3", "flashinfer", "triton"})


def open_door() -> None:
    """Let servers of this process keep prefill graphs."""
    from sglang_dcp.support import prefill_graphs

    prefill_graphs.SERVED = OPENED  # type: ignore[misc]


def opened(plugin: str) -> str:
    """Return the source of `plugin`, which also opens the door."""
    return with_door(plugin, "prefill_graph_door")
