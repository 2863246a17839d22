"""A door in the refusal of replicated Q for quantized weights on GPUs.

DCP refuses them at start until GPU servers have shown them right. The plugin of such a
server opens that door in its processes only.
"""

from __future__ import annotations

from helpers.doors import with_door

# The formats of `helpers.quantized`, as `support.quantization.format_of` names them.
OPENED = frozenset(
    {
        "awq",
        "awq_marlin",
        "compressed-tensors-float-quantized",
        "compressed-tensors-int-quantized",
        "compressed-tensors-pack-quantized",
        "fp8-block",
        "fp8-online",
        "fp8-tensor",
        "gptq",
        "gptq_marlin",
        "modelopt",
        "modelopt_fp8",
    }
)


def open_door() -> None:
    """Let servers of this process replicate Q with quantized weights."""
    from sglang_dcp.support import quantization

    quantization.GQA_REPLICATED_ON_GPU = OPENED
    quantization.MLA_REPLICATED_ON_GPU = OPENED


def opened(plugin: str) -> str:
    """Return the source of `plugin`, which also opens the door."""
    return with_door(plugin, "replication_door")
