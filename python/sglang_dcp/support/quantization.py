"""Formats of quantized weights, by SGLang's names: which load right with DCP.

Ranks of a DCP group hold the same K/V heads, and with `--dcp-replicate-q-proj` the same Q
heads. A format loads right if all of its tensors come through the loader of SGLang's QKV
layer, which knows which ranks share heads. Each loader was read.
"""

from __future__ import annotations

from typing import Optional

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
