"""Quantized dummy weights: what config.json says of them, and where they cannot be cut.

fp8         16-bit weights that SGLang quantizes at start, by output channel
fp8-tensor  FP8 as a checkpoint holds it, with one scale for each matrix
fp8-block   the same with a scale for each block of 128 x 128, as DeepSeek-V3 has
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

from decode_models import MODELS, is_mla, kv_heads, query_heads

BLOCK = 128
_CHECKPOINT = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
# By name, what is added to config.json: nothing where SGLang quantizes at start.
_CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8-tensor": _CHECKPOINT,
    "fp8-block": {**_CHECKPOINT, "weight_block_size": [BLOCK, BLOCK]},
}
QUANTIZATIONS = tuple(_CONFIGS)
# How results name weights that are not quantized.
PLAIN = "bf16"


def flag_value(name: Optional[str]) -> Optional[str]:
    """The value of SGLang's `--quantization`; None where config.json says it, or nothing."""
    return name if name and not _CONFIGS[name] else None


def config_entries(name: Optional[str]) -> dict[str, Any]:
    """What config.json says of the weights, beside the dimensions of the model."""
    config = _CONFIGS[name] if name else {}
    return {"quantization_config": config} if config else {}


def why_not(name: Optional[str], model: str, tp: int) -> Optional[str]:
    """Why SGLang cannot cut such weights of `model` over `tp` ranks, with DCP or without."""
    if name != "fp8-block":
        return None
    for what, width in _widths(model, tp):
        if width % BLOCK:
            return (
                f"--quantization {name}: at tp {tp} a rank has {width:g} {what} of "
                f"{model}, which is no multiple of {BLOCK}; fp8 and fp8-tensor have no "
                "blocks"
            )
    return None


def _widths(model: str, tp: int) -> Iterator[tuple[str, float]]:
    """The widths that SGLang cuts or fuses, of one rank of plain tensor parallelism.

    DCP and a replicated Q make them wider by whole numbers.
    """
    found = MODELS[model]
    heads = query_heads(model) / tp
    if is_mla(model):
        nope, value = found["qk_nope_head_dim"], found["v_head_dim"]
        yield "query columns", heads * (nope + found["qk_rope_head_dim"])
        yield "columns of K and V", heads * (nope + value)
        yield "attention outputs", heads * value
    else:
        size = found.get("head_dim", found["hidden_size"] // query_heads(model))
        yield "query columns", heads * size
        yield "columns of K", max(1.0, kv_heads(model) / tp) * size
    experts = "moe_intermediate_size" in found
    if not experts or found.get("first_k_dense_replace"):
        yield "columns of a dense layer", found["intermediate_size"] / tp
    if experts:
        yield "columns of an expert", found["moe_intermediate_size"] / tp
