"""Quantized layers that SGLang itself cannot serve, found in the config of a checkpoint.

They would end a server after the weights are read, or in the first forward. A config names
the modules that it leaves in 16 bit by words or by patterns, in a way of each format. A
module is taken for quantized only if no way of reading these names leaves it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Optional

from sglang_dcp.layers.heads import is_mla
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support.experts import has_experts
from sglang_dcp.support.quantization import quantization_config

# "layers/quantization/awq/awq_triton.py" is fine, but what "models/deepseek_common/utils.py"
# imports with it on CUDA, `sglang.kernel_api_logging`, is not in the release.
_NO_AWQ_SINCE = "0.5.23"
# Names of an expert's matrices, by block.
_EXPERT_NAMES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"),
}


def packed_latents(model: Any) -> Optional[str]:
    """Name the format of `kv_b_proj` if SGLang cannot derive the K weights of MLA from it.

    `models/deepseek_common/deepseek_weight_loader.py` takes `qweight` for one of AWQ, and
    needs `weight` of all others. `model` is SGLang's `ModelConfig`.
    """
    if not is_mla(model):
        return None
    config = quantization_config(model)
    name = model.quantization
    if name == "moe_wna16":
        name = config.get("quant_method")
    if name == "compressed-tensors" and config.get("linear_fp8_config"):
        # Then only experts are packed.
        return None
    if name == "compressed-tensors":
        packed = _all_groups(config, "pack-quantized", bits=(4, 8), inputs=None)
    elif name in ("awq", "awq_marlin"):
        packed = in_range(sglang_version(), _NO_AWQ_SINCE, None)
    else:
        packed = name in ("gptq", "gptq_marlin", "gguf")
    if not packed or _may_be_left(model, config, "self_attn.kv_b_proj"):
        return None
    return f"{name} kv_b_proj"


def int8_experts(model: Any) -> Optional[str]:
    """Name INT8 experts of compressed-tensors, which SGLang has for NPUs alone.

    `layers/quantization/compressed_tensors/compressed_tensors.py` raises for them.
    """
    config = quantization_config(model)
    if model.quantization != "compressed-tensors" or not has_experts(model):
        return None
    if not _all_groups(config, "int-quantized", bits=(8,), inputs="token"):
        return None
    left = any(
        _may_be_left(model, config, f"{block}.experts.0.{part}")
        for block, parts in _EXPERT_NAMES.items()
        for part in parts
    )
    return None if left else "INT8 experts"


def _all_groups(
    config: dict[str, Any], form: str, *, bits: tuple[int, ...], inputs: Optional[str]
) -> bool:
    """Whether each group of compressed-tensors has integer weights stored in `form`.

    `inputs` is the strategy of their activations, None if these are not quantized.
    """
    groups = [*(config.get("config_groups") or {}).values()]
    if config.get("format") != form or not groups:
        return False
    return all(
        group.get("format") in (None, form)
        and (weights := group.get("weights") or {}).get("type") == "int"
        and weights.get("num_bits") in bits
        and (group.get("input_activations") or {}).get("strategy") == inputs
        for group in groups
    )


def _may_be_left(model: Any, config: dict[str, Any], module: str) -> bool:
    """Whether the config may leave `module` of the last layer in 16 bit."""
    last = model.hf_text_config.num_hidden_layers - 1
    name = f"model.layers.{last}.{module}"
    return any(_may_match(entry, name) for entry in _left_out(config))


def _left_out(config: dict[str, Any]) -> Iterator[str]:
    for key in ("ignore", "modules_to_not_convert"):
        yield from config.get(key) or ()
    # GPTQModel marks patterns of what is not quantized.
    yield from (key for key in config.get("dynamic") or () if key.startswith("-:"))


def _may_match(entry: str, name: str) -> bool:
    pattern = entry.removeprefix("re:").removeprefix("-:")
    if pattern != entry:
        return re.search(pattern, name) is not None
    return entry in name or name in entry
