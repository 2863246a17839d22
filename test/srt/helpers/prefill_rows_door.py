"""A door in what keeps short prefills on GPUs from becoming decode rows.

DCP makes none there until GPU servers have shown it right. The plugin of such a server
opens that door in its processes only. No prefix is gathered there, because that would take
the host less. The rule by lengths stays.
"""

from __future__ import annotations

OPENED = frozenset({"fa3", "flashinfer", "triton"})


def open_door() -> None:
    """Let servers of this process prefill a few new tokens as decode rows."""
    from sglang_dcp.layers.prefix import kv_form

    kv_form.ROWS_SERVED = OPENED  # type: ignore[misc]
    kv_form.MOST_GATHERED_BYTES = 0  # type: ignore[misc]
