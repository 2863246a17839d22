"""The attention backend of a server that names none, and what its model asks of one."""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch

from sglang_dcp.layers.adaptors.registry import FP8, Need, adaptor_names, unmet

logger = logging.getLogger(__name__)


def default_backend(preferred: Optional[str], need: Need) -> str:
    """The attention backend where the user names none: SGLang's choice if it can serve.

    With no other that can serve, SGLang's choice all the same: refused by `finish`.
    """
    names = adaptor_names(need)
    # Without its own kernels here (no Hopper), FA3 is not what SGLang prefers.
    others = [name for name in names if name != "fa3"]
    if preferred in names or not others:
        chosen = preferred or "torch_native"
        logger.info("DCP: no attention backend named, using %s", chosen)
        return chosen
    problem = unmet(preferred, need) if preferred else None
    why = f" and not {preferred}: {problem.reason}" if problem else ""
    logger.info("DCP: no attention backend named, using %s%s", others[0], why)
    return others[0]


def need_of(args: Any, model: Any, mla: bool) -> Need:
    """What `model`, SGLang's `ModelConfig`, asks of an attention backend."""
    # `auto` may still turn out to be fp8, when the weights are read: `build_kv_pool`.
    kv_dtypes = {"fp8_e4m3": FP8, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    return Need(
        args.device,
        mla,
        model.dtype,
        (model.kv_lora_rank, model.qk_rope_head_dim) if mla else model.head_dim,
        kv_dtypes.get(args.kv_cache_dtype),
        model.hf_text_config.num_attention_heads // args.dcp.tp_size,
    )
