"""Payloads of any bit pattern."""

from __future__ import annotations

from typing import Tuple

import torch


def random_bytes(shape: Tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern, so that a copy by value or a rounding would show."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.empty((), dtype=dtype).element_size()
    top = 2 if dtype == torch.bool else 256
    size = (*shape[:-1], shape[-1] * width)
    data = torch.randint(top, size, dtype=torch.uint8, generator=generator)
    return data.view(dtype)
