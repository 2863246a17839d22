"""The calls that DCP attention accepts from a model, and the two layouts of MLA's rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


def check_call(
    layer: RadixAttention, k: Optional[torch.Tensor], extra: dict[str, Any]
) -> None:
    """Reject arguments that attention over a sharded sequence would silently ignore.

    Raises
    ------
    NotImplementedError
        The message names the layer and the arguments.
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
    """Return queries or keys as [tokens, heads, qk_dim].

    MLA may pass the latent part `front` and the rotary part `rope` separately. SGLang
    does so for the backends in `FORWARD_ABSORB_CORE_ATTENTION_BACKENDS`
    (`forward_mla.py`). For others, `front` is the whole row.
    """
    if rope is None:
        return front.view(front.shape[0], -1, layer.qk_head_dim)
    return torch.cat(by_head(layer, front, rope), dim=-1)


def by_head(
    layer: RadixAttention, latent: torch.Tensor, rope: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """View MLA's two parts as [tokens, heads, dim], with any strides."""
    tokens, rope_dim = latent.shape[0], layer.qk_head_dim - layer.v_head_dim
    return latent.view(tokens, -1, layer.v_head_dim), rope.view(tokens, -1, rope_dim)


def first_rows(tokens: int, *rows: Any) -> tuple[Any, ...]:
    """Return the first `tokens` rows of each tensor, as views. None stays None."""
    return tuple(None if part is None else part[:tokens] for part in rows)


def padded_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Append rows of 0 until there are `count`. It returns `rows` where none is missing."""
    missing = count - rows.shape[0]
    if not missing:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def as_stored(rows: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Round `rows` as a pool of dtype `stored` would. The dtype of `rows` stays."""
    if stored.itemsize >= rows.itemsize:
        return rows
    return rows.to(stored).to(rows.dtype)


def split_latent(
    rows: torch.Tensor, layer: RadixAttention
) -> tuple[torch.Tensor, torch.Tensor]:
    """View MLA's rows [..., qk_dim] as latent and rotary part."""
    return rows[..., : layer.v_head_dim], rows[..., layer.v_head_dim :]
