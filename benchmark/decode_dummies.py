"""FP8 dummy weights that are as large as those in 16 bit.

SGLang draws dummies below 0.001, and FP8 rounds most of these to zero. A GPU multiplies zeros
with less power, and so at a higher clock. Here FP8 weights are drawn below 1, with scales of
0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What SGLang draws below.
LARGEST = 1e-3
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("weight_scale", "weight_scale_inv")


def fill_fp8(model: nn.Module, seed: int = 1234) -> None:
    """Draw the FP8 weights of a model that is loaded and not yet processed, in place.

    Weights of the same shape are alike on all ranks, as SGLang's are.
    """
    for name, weight in model.state_dict().items():
        if weight.dtype in _FP8:
            generator = torch.Generator(weight.device).manual_seed(seed)
            drawn = torch.empty(weight.shape, dtype=torch.float16, device=weight.device)
            weight.copy_(drawn.uniform_(-1, 1, generator=generator).to(weight.dtype))
        elif name.endswith(_SCALES):
            weight.fill_(LARGEST)


@contextmanager
def fp8_dummies() -> Iterator[None]:
    """Let SGLang's dummy loader draw FP8 weights as `fill_fp8` does."""
    from sglang.srt.model_loader import loader

    original: Callable[..., None] = loader.initialize_dummy_weights

    def draw(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        fill_fp8(model)

    loader.initialize_dummy_weights = draw
    try:
        yield
    finally:
        loader.initialize_dummy_weights = original
