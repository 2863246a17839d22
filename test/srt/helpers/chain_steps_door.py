"""A door in what keeps the steps of short prefills from being chains on a CPU.

There prefixes are short, so no chain is faster, and no step has a graph. The plugin of a
server opens that door in its processes only, and `short_prefill_door` with it. Each step of
one request is a chain then, of any length.
"""

from __future__ import annotations

from helpers import short_prefill_door


def open_door() -> None:
    """Let CPU servers of this process run short prefills of one request as chains."""
    from sglang_dcp.layers import chain_steps, short_prefill
    from sglang_dcp.layers.short_prefill_rule import Rule

    short_prefill_door.open_door()
    chain_steps.WIDTHS = tuple(range(2, short_prefill.MOST_EAGER_ROWS + 1))
    setattr(Rule, "chain_is_faster", lambda rule, new, prefix, width: True)
