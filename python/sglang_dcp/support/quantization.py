"""Formats of quantized weights, by SGLang's names: which load right with DCP.

Ranks of a DCP group hold the same K/V heads, and with `--dcp-replicate-q-proj` the same Q
heads. A format loads right if all of its tensors come through the loader of SGLang's QKV
layer, which knows which ranks share heads. Each loader was read.

On GPUs a replicated Q projection is refused for weights in a format whose servers did not
pass a comparison with tp 1 there. Latent attention (MLA) projects Q by other layers than K/V
heads do, so each kind has its own formats.
"""

from __future__ import annotations

from typing import Any, NoReturn, Optional

from torch import nn

from sglang_dcp.layers.heads import is_mla
from sglang_dcp.layers.q_replication import q_projections
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support.rules import raise_unsupported, runs_on_gpu

# Formats, as `format_of` names them, whose servers with a replicated Q projection passed the
# comparison with tp 1 on GPUs, with latent attention and with K/V heads. SGLang 0.5.23 ran.
_PASSED_SINCE = "0.5.23"
MLA_PASSED = frozenset(
    {
        "compressed-tensors-float-quantized-8bit-channel",
        "compressed-tensors-pack-quantized-4bit-group",
        "fp8-block",
        "fp8-online",
        "fp8-tensor-dynamic",
        "gptq_marlin-4bit",
        "modelopt_fp8",
    }
)
# SGLang 0.5.23 itself cannot serve DeepSeek with AWQ or with INT8 experts.
GQA_PASSED = MLA_PASSED | {
    "awq_marlin-4bit",
    "compressed-tensors-int-quantized-8bit-channel",
}

# "sglang/srt/layers/quantization/__init__.py" of both releases.
LOADS_RIGHT = frozenset(
    {
        "auto-round",
        "auto-round-int8",
        "awq",
        "awq_marlin",
        "blockwise_int8",
        "compressed-tensors",
        "fp8",
        "gguf",
        "gptq",
        "gptq_marlin",
        "humming",
        "minimax_m3_nvfp4",
        "modelopt",
        "modelopt_fp4",
        "modelopt_fp8",
        "modelopt_mixed",
        "moe_wna16",
        "mxfp4",
        "mxfp8",
        "nvfp4_online",
        "quark",
        "w4afp8",
        "w8a8_fp8",
        "w8a8_int8",
    }
)
# They have kernels for ROCm, NPUs or Apple's GPUs alone.
OTHER_DEVICES = frozenset(
    {
        "mlx_q4",
        "mlx_q8",
        "modelslim",
        "mxfp_w4a8",
        "petit_nvfp4",
        "quark_int4fp8_moe",
        "quark_mxfp4",
    }
)
# Its own loader quantizes rows of K and V that it cuts by tensor-parallel rank.
CUTS_BY_RANK = frozenset({"bitsandbytes"})


def is_unknown(name: Optional[str]) -> bool:
    """Whether a format has no kernel for the served devices, or is not known here."""
    return name is not None and name not in LOADS_RIGHT | CUTS_BY_RANK


def quantization_config(model: Any) -> dict[str, Any]:
    """Return what the checkpoint says of its quantization; empty if it says nothing.

    `model` is SGLang's `ModelConfig`.
    """
    found = getattr(model.hf_config, "quantization_config", None) or {}
    return dict(found if isinstance(found, dict) else found.to_dict())


def format_of(model: Any) -> Optional[str]:
    """Name the format of a model's weights, or return None if they are not quantized.

    It is SGLang's name for it, longer where that stands for several formats.
    """
    name: Optional[str] = model.quantization
    config = quantization_config(model)
    if name == "compressed-tensors":
        return "-".join([name, str(config.get("format")), *_schemes(config)])
    if name == "fp8":
        return _fp8_of(config)
    return f"{name}-{config['bits']}bit" if name and "bits" in config else name


def _schemes(config: dict[str, Any]) -> list[str]:
    """Name how the groups of a compressed-tensors checkpoint store their weights."""
    groups = (config.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    return sorted({f"{w.get('num_bits')}bit-{w.get('strategy')}" for w in weights})


def _fp8_of(config: dict[str, Any]) -> str:
    if not config:
        return "fp8-online"
    if config.get("weight_block_size"):
        return "fp8-block"
    return f"fp8-tensor-{config.get('activation_scheme')}"


def check_replicated_q(model: Any, device: Optional[str]) -> None:
    """Raise `DcpConfigError` for weights that have not passed on GPUs with a replicated Q.

    It runs before a weight is loaded. `device` is that of the server, None if it is not
    chosen yet.
    """
    name = format_of(model)
    if name not in (None, *replicated_on_gpu(model)) and runs_on_gpu(device):
        kind = "MLA and " if is_mla(model) else ""
        _raise_unproven(f"with {kind}{name} weights")


def replicated_on_gpu(model: Any) -> frozenset[str]:
    """Return the formats with which GPUs serve a replicated Q for such a model."""
    if not in_range(sglang_version(), _PASSED_SINCE, None):
        return frozenset()
    return MLA_PASSED if is_mla(model) else GQA_PASSED


def check_replicated_layers(built: nn.Module, model: Any) -> None:
    """Raise `DcpConfigError` for a quantized layer of a model that names no format.

    A checkpoint or an environment variable may quantize single layers. `built` is not
    loaded yet.
    """
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    if format_of(model) in replicated_on_gpu(model):
        return
    for name, layer in q_projections(built):
        on_gpu = any(parameter.device.type != "cpu" for parameter in layer.parameters())
        if on_gpu and not isinstance(layer.quant_method, UnquantizedLinearMethod):
            _raise_unproven(f"with {name} by {type(layer.quant_method).__name__}")


def torchao_beside_replicated_q(args: Any) -> Optional[str]:
    """Return the value of `--torchao-config` where it is refused, else None."""
    name: Optional[str] = args.torchao_config
    if not name or not args.dcp.replicate_q_proj:
        return None
    return name if runs_on_gpu(args.device) else None


UNPROVEN = (
    "no server with such weights and a replicated Q projection has passed the comparison "
    "with tp 1 on a GPU"
)
DROP_REPLICATION = "drop --dcp-replicate-q-proj"


def _raise_unproven(value: str) -> NoReturn:
    raise_unsupported("--dcp-replicate-q-proj", value, UNPROVEN, DROP_REPLICATION)
