"""A door in what keeps a prefix of K/V heads in place on GPUs.

DCP gathers no K and V there until GPU servers have shown it right. The plugin of such a
server opens that door in its processes only. The rule by lengths stays.
"""

from __future__ import annotations

OPENED = frozenset({"fa3", "flashinfer", "triton"})


def open_door() -> None:
    """Let servers of this process gather K and V of a prefix."""
    from sglang_dcp.layers.prefix import kv_form

    kv_form.SERVED = OPENED  # type: ignore[misc]
