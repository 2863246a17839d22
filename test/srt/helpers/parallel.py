"""SGLang's parallel sizes and ranks, as a test needs them."""

from __future__ import annotations

from typing import Any, ContextManager


def attention_width(ranks: int, rank: int = 0) -> ContextManager[Any]:
    """SGLang's readers see rank `rank` of `ranks`, all of them for attention."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().override(
        tp_size=ranks,
        tp_rank=rank,
        attn_tp_size=ranks,
        attn_tp_rank=rank,
        moe_tp_size=ranks,
    )
