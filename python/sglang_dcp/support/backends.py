"""The attention backend that serves a model with DCP, and the error if none can."""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch

from sglang_dcp.layers.backends.capabilities import FP8, Mismatch, Requirement
from sglang_dcp.layers.backends.registry import backend_names, find_mismatch
from sglang_dcp.support.kv_dtype import kv_dtype_of_checkpoint
from sglang_dcp.support.rules import raise_unsupported

logger = logging.getLogger(__name__)


def requirement_of(args: Any, model: Any, mla: bool) -> Requirement:
    """Return what `model`, SGLang's `ModelConfig`, requires of an attention backend."""
    kv_dtypes = {"fp8_e4m3": FP8, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    kv_dtype = kv_dtypes.get(args.kv_cache_dtype)
    if args.kv_cache_dtype == "auto":
        kv_dtype = kv_dtype_of_checkpoint(model)
    return Requirement(
        args.device,
        mla,
        model.dtype,
        (model.kv_lora_rank, model.qk_rope_head_dim) if mla else model.head_dim,
        kv_dtype,
        model.hf_text_config.num_attention_heads // args.dcp.tp_size,
    )


def default_backend(preferred: Optional[str], requirement: Requirement) -> str:
    """Choose the attention backend if the user names none.

    SGLang's choice `preferred` is taken if it can serve, otherwise the first other that
    can. If none can, `preferred` is returned. `finish` of the server arguments then
    reports why it cannot serve.
    """
    names = backend_names(requirement)
    # SGLang prefers FA3 on GPUs that have its kernels (Hopper), so it is no alternative.
    others = [name for name in names if name != "fa3"]
    if preferred in names or not others:
        chosen = preferred or "torch_native"
        logger.info("DCP: no attention backend named, using %s", chosen)
        return chosen
    mismatch = find_mismatch(preferred, requirement) if preferred else None
    why = f" and not {preferred}: {mismatch.reason}" if mismatch else ""
    logger.info("DCP: no attention backend named, using %s%s", others[0], why)
    return others[0]


def check_backend(
    name: str, requirement: Requirement, *, flag: str = "--attention-backend"
) -> None:
    """Raise `DcpConfigError` if backend `name`, which `flag` names, cannot serve."""
    mismatch = find_mismatch(name, requirement)
    if mismatch is None:
        return
    others = backend_names(requirement)
    if not others:
        mismatch = _mismatch_of_all(name, requirement) or mismatch
        hint = _NO_OTHER_BACKEND[mismatch.flag]
    elif mismatch.flag == "--attention-backend":
        mismatch = mismatch._replace(flag=flag)
        hint = f"use {', '.join(others)}"
    else:
        hint = f"use --attention-backend {' or '.join(others)}"
    raise_unsupported(mismatch.flag, mismatch.value, mismatch.reason, hint)


def _mismatch_of_all(name: str, requirement: Requirement) -> Optional[Mismatch]:
    """Find the one requirement without which some backend could serve."""
    for part in ("kv_dtype", "head_dim", "dtype"):
        unknown: dict[str, Any] = {part: None}
        if could := backend_names(requirement._replace(**unknown)):
            return find_mismatch(name if name in could else could[0], requirement)
    return None


_NO_OTHER_BACKEND = {
    "--attention-backend": "serve this model without DCP",
    "--dtype": "use --dtype bfloat16",
    "--kv-cache-dtype": "use --kv-cache-dtype auto",
    "--model-path": "serve this model without DCP",
}
