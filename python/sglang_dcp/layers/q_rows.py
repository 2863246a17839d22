"""A rank's own outputs of a Q projection that has the outputs of its whole DCP group.

SGLang's own linear method computes. Where it reads plain rows of a weight and of its
scales, it gets a view of the rows that are wanted. Every other layout (transposed, packed,
repacked for a kernel) is computed whole, and the outputs are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch

# Tensors of a layer by name, cut to the given outputs; None if they have another layout.
Cut = Callable[[Any, Any, slice], Optional[dict[str, torch.Tensor]]]

# Bytes that a kernel may load at once.
_ALIGNMENT = 16


class RowsOf:
    """A linear layer that shows other tensors under the names of some of its own."""

    def __init__(self, layer: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._layer = layer
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def apply_rows(
    method: Any,
    layer: Any,
    parts: Sequence[slice],
    x: Any,
    bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """Compute the outputs of `parts`, one after another.

    Parameters
    ----------
    method
        SGLang's linear method of `layer`.
    parts : sequence of slice
        Outputs of the layer.
    x
        What the method takes: [tokens, inputs], or a quantized input with its scales.
    bias : Tensor [outputs], optional

    Returns
    -------
    Tensor [tokens, outputs of all parts]
    """
    views = [row_view(method, layer, part) for part in parts]
    if None in views:
        whole = method.apply(layer, x, bias)
        # What follows a projection may take its outputs for contiguous rows.
        found = [whole[..., part].contiguous() for part in parts]
    else:
        found = [
            method.apply(view, x, None if bias is None else bias[part])
            for view, part in zip(views, parts)
        ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def row_view(method: Any, layer: Any, part: slice) -> Optional[RowsOf]:
    """Return the layer with only the outputs `part`, or None if it cannot be cut so."""
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    cuts: dict[type, Cut] = {
        UnquantizedLinearMethod: _plain_rows,
        Fp8LinearMethod: _block_fp8_rows,
    }
    cut = cuts.get(type(method))
    packed = getattr(layer, "use_intel_amx_backend", False)
    tensors = None if cut is None or packed else cut(method, layer, part)
    return None if tensors is None else RowsOf(layer, tensors)


def _plain_rows(
    method: Any, layer: Any, part: slice
) -> Optional[dict[str, torch.Tensor]]:
    # torchao puts tensors of its own classes here.
    plain = type(layer.weight.data) is torch.Tensor
    return {"weight": layer.weight.data[part]} if plain else None


def _block_fp8_rows(
    method: Any, layer: Any, part: slice
) -> Optional[dict[str, torch.Tensor]]:
    """Cut between blocks. Other kernels than those of plain blocks take other scales."""
    elsewhere = ("use_marlin", "use_mxfp8", "block_fp8_as_mxfp8")
    if not method.block_quant or any(getattr(method, n, False) for n in elsewhere):
        return None
    rows, inputs = layer.weight.shape
    block, block_in = method.quant_config.weight_block_size
    scales = layer.weight_scale_inv.data
    blocks = slice(part.start // block, -(-part.stop // block))
    fits = (
        scales.dtype == torch.float32
        and scales.shape == (-(-rows // block), -(-inputs // block_in))
        and not getattr(layer.weight_scale_inv, "format_ue8m0", False)
        and getattr(layer, "_block_fp8_bf16_weight", None) is None
        and part.start % block == 0
        and (part.stop % block == 0 or part.stop == rows)
        and blocks.start * scales.shape[1] * scales.itemsize % _ALIGNMENT == 0
    )
    if not fits:
        return None
    return {"weight": layer.weight.data[part], "weight_scale_inv": scales[blocks]}
