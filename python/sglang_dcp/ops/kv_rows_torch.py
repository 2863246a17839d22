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
    for layer, pools in enumerate(zip(keys, values)):
        parts = [pool[at].flatten(2) for pool in pools]
        packed[:, layer] = torch.cat(parts, dim=2)


def order_kv_rows_torch(
    packed: Tensor, order: Tensor, window: int, qk: int, v: int
) -> tuple[Tensor, Tensor]:
    """Do what ``order_kv_rows`` does."""
    rows = packed.transpose(0, 1).flatten(1, 2)[:, order]
    parts = rows.tensor_split([window * qk], dim=2)
    keys, values = (
        part.unflatten(2, (window, dim)).contiguous()
        for part, dim in zip(parts, (qk, v))
    )
    return keys, values
