"""What a model may ask of DCP attention, and the two forms in which it asks for MLA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def check_call(
    layer: RadixAttention, k: Optional[torch.Tensor], extra: dict[str, Any]
) -> None:
    """Refuse what attention over a sharded sequence would drop in silence.

    Raises
    ------
    NotImplementedError
        Naming the layer and the arguments.
    """
    unknown = sorted(name for name, value in extra.items() if value is not None)
    special = (
        layer.is_cross_attention
        or k is None
        or layer.logit_cap
        or layer.sliding_window_size > -1
        or layer.xai_temperature_len > 0
        or layer.attn_type.value != "decoder"
    )
    if unknown or special:
        raise NotImplementedError(
            f"DCP attention, layer {layer.layer_id}: cross attention, shared K/V, "
            "logit capping, windows, encoder attention or the arguments "
            f"{unknown} are not supported"
        )


def whole_rows(
    layer: RadixAttention, front: torch.Tensor, rope: Optional[torch.Tensor]
) -> torch.Tensor:
    """[tokens, heads, qk_dim] of queries or keys, which MLA may bring in two parts.

    SGLang hands some backends the latent part `front` and the rotary part `rope` apart
    (`forward_mla.py`, `FORWARD_ABSORB_CORE_ATTENTION_BACKENDS`), others one tensor.
    """
    if rope is None:
        return front.view(front.shape[0], -1, layer.qk_head_dim)
    return torch.cat(by_head(layer, front, rope), dim=-1)


def by_head(
    layer: RadixAttention, latent: torch.Tensor, rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts as [tokens, heads, dim], views of whatever strides they have."""
    tokens, rope_dim = latent.shape[0], layer.qk_head_dim - layer.v_head_dim
    return latent.view(tokens, -1, layer.v_head_dim), rope.view(tokens, -1, rope_dim)


def as_stored(rows: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """What a pool of dtype `stored` keeps of `rows`, in their own dtype."""
    if stored.itemsize >= rows.itemsize:
        return rows
    return rows.to(stored).to(rows.dtype)


def split_latent(
    rows: torch.Tensor, layer: RadixAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and rotary part of MLA's [..., qk_dim], as views."""
    return rows[..., : layer.v_head_dim], rows[..., layer.v_head_dim :]
