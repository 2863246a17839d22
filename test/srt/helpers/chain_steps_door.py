"""A door in what keeps the steps of short prefills from being chains.

DCP makes chains only where GPU servers have shown them right and fast. The plugin of a server
opens that door in its processes only, and `short_prefill_door` with it. On a CPU prefixes are
short and no step has a graph. There, each step of one request is a chain, of any length.
"""

from __future__ import annotations

import itertools

import torch

from helpers import short_prefill_door


def open_door() -> None:
    """Let servers of this process run short prefills of one request as chains."""
    from sglang_dcp.layers import chain_steps, short_prefill
    from sglang_dcp.layers.short_prefill_rule import Rule

    short_prefill_door.open_door()
    served = itertools.product(short_prefill_door.OPENED, short_prefill.Stored)
    short_prefill.CHAINS_SERVED = frozenset(served)  # type: ignore[misc]
    if not torch.cuda.is_available():
        chain_steps.WIDTHS = tuple(range(2, short_prefill.MOST_EAGER_ROWS + 1))
        setattr(Rule, "chain_is_faster", lambda rule, new, prefix, width: True)
