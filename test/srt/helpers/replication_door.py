"""A door in the refusal of replicated Q for quantized weights on GPUs.

DCP refuses a format at start until GPU servers have shown it right. The plugin of such a
server opens that door in its processes only.
"""

from __future__ import annotations

# The formats of `helpers.quantized`, as `support.quantization.format_of` names them.
OPENED = frozenset(
    {
        "awq-4bit",
        "awq_marlin-4bit",
        "compressed-tensors-float-quantized-8bit-channel",
        "compressed-tensors-int-quantized-8bit-channel",
        "compressed-tensors-pack-quantized-4bit-group",
        "fp8-block",
        "fp8-online",
        "fp8-tensor-dynamic",
        "fp8-tensor-static",
        "gptq-4bit",
        "gptq_marlin-4bit",
        "modelopt",
        "modelopt_fp8",
    }
)


def open_door() -> None:
    """Let servers of this process replicate Q with quantized weights."""
    from sglang_dcp.support import quantization

    quantization.GQA_PASSED = OPENED
    quantization.MLA_PASSED = OPENED
