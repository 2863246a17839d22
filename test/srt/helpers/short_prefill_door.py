"""A door in what keeps short prefills from being decode steps.

DCP makes none until GPU servers have shown it right and fast. The plugin of such a server
opens that door in its processes only. The rule by lengths stays. On a GPU a step runs only
where it has a graph, and on a CPU, which has none, without one.
"""

from __future__ import annotations

import torch

OPENED = frozenset({"fa3", "flashinfer", "triton", "torch_native"})


def open_door() -> None:
    """Let servers of this process run short prefills as decode steps."""
    from sglang_dcp.layers import short_prefill

    short_prefill.SERVED = OPENED  # type: ignore[misc]
    if not torch.cuda.is_available():
        short_prefill.MOST_EAGER_ROWS = 64  # type: ignore[misc]
