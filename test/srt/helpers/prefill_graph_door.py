"""A door in what keeps prefill graphs off with groups of experts.

DCP turns them off until GPU servers have shown them right. The plugin of such a server
opens that door in its processes only.
"""

from __future__ import annotations


def open_door() -> None:
    """Let servers of this process keep prefill graphs with `--ep-size`."""
    from sglang_dcp.support import prefill_graphs

    rows = prefill_graphs.EAGER_PREFILL
    prefill_graphs.EAGER_PREFILL = tuple(r for r in rows if r.flag != "--ep-size")
