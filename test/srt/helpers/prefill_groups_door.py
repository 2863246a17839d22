"""A door in what keeps MLA prefills on GPUs in one form for all requests.

DCP makes no prefill by group there until GPU servers have shown it right. The plugin of
such a server opens that door in its processes only. Launches cost nothing there, so that
prompts of test lengths take the form too.
"""

from __future__ import annotations

import math
from functools import partial

OPENED = frozenset({"fa3", "flashinfer"})


def open_door() -> None:
    """Let MLA servers of this process prefill by group, by work on the GPU alone."""
    from sglang_dcp.layers.mla import dispatch, form, groups
    from sglang_dcp.layers.prefix.rates import HOPPER

    free = HOPPER._replace(
        tile_flops=math.inf, in_place_host_s=0.0, gather_host_s=0.0, chunk_host_s=0.0
    )
    groups.SERVED = OPENED  # type: ignore[misc]
    dispatch.choose_prefill_form = partial(  # type: ignore[assignment]
        form.choose_prefill_form, rates=free
    )
    dispatch.groups_of = partial(form.groups_of, rates=free)  # type: ignore[assignment]
