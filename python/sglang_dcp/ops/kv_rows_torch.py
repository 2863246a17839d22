"""Torch forms of ``kv_rows``: the reference of its kernels, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_kv_rows_torch(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    heads: Tensor,
    packed: Tensor,
) -> None:
    """Do what ``pack_kv_rows`` does."""
    at = slots[:, None], heads[:, None]
    border = heads.shape[1] * keys[0].shape[2]
    for layer, (key, value) in enumerate(zip(keys, values)):
        packed[:, layer, :, :border] = key[at].flatten(2)
        packed[:, layer, :, border:] = value[at].flatten(2)


def order_kv_rows_torch(
    packed: Tensor, order: Tensor, window: int, qk: int, v: int
) -> tuple[Tensor, Tensor]:
    """Do what ``order_kv_rows`` does."""
    layers, positions = packed.shape[1], len(order)
    order = order.clamp(min=0)
    keys = packed.new_empty(layers, positions, window, qk)
    values = packed.new_empty(layers, positions, window, v)
    for layer in range(layers):
        rows = packed[:, layer].flatten(0, 1)
        for out, part in zip((keys, values), rows.tensor_split([window * qk], dim=1)):
            torch.index_select(part, 0, order, out=out[layer].flatten(1))
    return keys, values
