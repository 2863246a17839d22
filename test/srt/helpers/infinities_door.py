"""A door to pages that once held anything: each slot of a new KV pool holds infinities.

Freed pages keep what was written to them, and padding reads the dummy page. The plugin of
such a server fills the pools of its processes, of K/V heads and of latents, before a request
writes to them. SGLang hooks them once it imports the pools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_POOLS = "sglang.srt.mem_cache.memory_pool"
TARGETS = tuple(
    f"{_POOLS}.{name}._create_buffers"
    for name in ("MHATokenToKVPool", "MLATokenToKVPool")
)
# NaN in float8_e4m3fn, which has no infinity. SGLang keeps such a pool as bytes.
FP8_NAN = 0x7F


def fill(buffer: torch.Tensor) -> None:
    """Fill a pool of one layer by infinities, or by NaN where its numbers are fp8."""
    if buffer.itemsize == 1:
        buffer.view(torch.uint8).fill_(FP8_NAN)
    else:
        buffer.fill_(float("inf"))


def create_buffers(
    original: Callable[..., None], pool: Any, *args: Any, **kwargs: Any
) -> None:
    """Hook: `_create_buffers` of both pools."""
    original(pool, *args, **kwargs)
    latents = hasattr(pool, "kv_buffer")
    buffers = pool.kv_buffer if latents else (*pool.k_buffer, *pool.v_buffer)
    for buffer in buffers:
        fill(buffer)


def open_door() -> None:
    """Let pools that this process makes hold infinities."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target in TARGETS:
        HookRegistry.register(target, create_buffers, HookType.AROUND)
