"""GPU kernels that only allocate what they would return and need, on a CPU.

All Triton kernels, the merge kernels of this package, the communication, and
FlashAttention-3 with the splits that it chooses by its source. So a test can count what a
forward allocates on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor

from helpers.mla_kernels_torch import Fa3Plans
from sglang_dcp.distributed.exchange import a2a, ag_rs, base
from sglang_dcp.ops import chains, lse_merge, partials

SMS = 132


class SilentGroup:
    """A DCP group that sends nothing. Its all-gather allocates as SGLang's does."""

    pynccl_comm = None

    def __init__(self, world_size: int, rank: int = 0) -> None:
        self.world_size, self.rank_in_group = world_size, rank

    def all_gather(self, rows: Tensor, dim: int = -1) -> Tensor:
        assert dim == 0
        return rows.new_zeros(self.world_size * len(rows), *rows.shape[1:])


@contextmanager
def allocating_kernels() -> Iterator[None]:
    """Take the paths of a GPU, without its kernels."""
    from triton.runtime.jit import JITFunction

    names = ("combine", "cut", "interleave", "merge_two")
    kernels = SimpleNamespace(**{name: lambda *args: None for name in names})
    with ExitStack() as stack:
        for module in (partials, lse_merge):
            stack.enter_context(
                mock.patch.object(module, "_kernels_for", lambda *tensors: kernels)
            )
        for module in (a2a, ag_rs, base):
            stack.enter_context(
                mock.patch.object(module, "exchange_with_peers", lambda *tensors: None)
            )
        stack.enter_context(mock.patch.object(torch.cuda, "Event", mock.Mock))
        stack.enter_context(
            mock.patch.object(chains, "uses_kernels", lambda *tensors: True)
        )
        stack.enter_context(
            mock.patch.object(JITFunction, "run", lambda self, *args, **more: None)
        )
        yield


class AllocatingFa3(Fa3Plans):
    """SGLang's FlashAttention backend with kernels that only allocate.

    Attributes
    ----------
    splits : list of int
        Splits of each call over pages.
    ragged_splits : list of (bool, int or None)
        Of each call over rows, whether it was causal, and the splits that were asked for.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.splits: list[int] = []
        self.ragged_splits: list[tuple[bool, Optional[int]]] = []

    def flash_attn_varlen_func(
        self,
        *,
        q: Tensor,
        v: Tensor,
        causal: bool,
        num_splits: Optional[int] = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        # By default it does not split.
        self.ragged_splits.append((causal, num_splits))
        return _split_result(q, v.shape[-1], 1 if num_splits is None else num_splits)

    def flash_attn_with_kvcache(
        self,
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        max_seqlen_q: int,
        causal: bool,
        num_splits: int,
        qv: Optional[Tensor] = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        heads, v_dim = q.shape[1], v_cache.shape[-1]
        splits = num_splits or fa3_splits(
            rows=max_seqlen_q * heads // k_cache.shape[2],
            kv_heads=k_cache.shape[2],
            keys=page_table.shape[1] * self.page_size,
            dims=k_cache.shape[-1] + v_dim,
            tile=fa3_tile(k_cache.shape[-1], v_dim),
            causal=causal,
        )
        self.splits.append(splits)
        return _split_result(q, v_dim, splits)


class AllocatingFlashInfer:
    """FlashInfer's wrappers for heads and for latents; their splits are in its scratch."""

    def plan(self, *args: Any, **plan: Any) -> None:
        pass

    def forward_return_lse(self, q: Tensor, cache: Any, **how: Any) -> Any:
        return q.new_zeros(*q.shape[:2], cache[1].shape[-1]), _lse(q)

    def run(self, latent: Tensor, *rest: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        return latent.new_zeros(latent.shape), _lse(latent)


def _lse(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[:2], dtype=torch.float32)


def _split_result(q: Tensor, v_dim: int, splits: int) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    dtype = torch.bfloat16 if q.itemsize == 1 else q.dtype
    out = q.new_zeros(tokens, heads, v_dim, dtype=dtype)
    lse = q.new_zeros(heads, tokens, dtype=torch.float32)
    if splits > 1:
        q.new_zeros(splits, heads, tokens, v_dim + 1, dtype=torch.float32)
    return out, lse


def fa3_tile(qk_dim: int, v_dim: int) -> int:
    """Return the rows of a tile of FlashAttention-3 on Hopper, by its source.

    Of MLA, `qk_dim` is that of the rotary part.
    """
    if v_dim == 512:
        return 64
    return 192 if qk_dim <= 96 else 128


def fa3_splits(
    rows: int, kv_heads: int, keys: int, dims: int, tile: int, causal: bool
) -> int:
    """Return how many splits FlashAttention-3 chooses on 132 SMs, by its source."""
    tiles = -(-rows // tile)
    if kv_heads * tiles >= 0.8 * SMS:
        head_bytes, l2_bytes = keys * dims * 2, 50 << 20
        if causal or head_bytes <= l2_bytes or tiles < 2 * SMS:
            return 1
        return min(-(-head_bytes // l2_bytes), 128)
    key_tiles = -(-keys // (64 if dims > 512 else 128))
    if key_tiles <= 4:
        return 1
    waves = [kv_heads * tiles * n / SMS for n in range(1, min(128, key_tiles) + 1)]
    filled = [wave / math.ceil(wave) for wave in waves]
    return next(n for n, f in enumerate(filled, 1) if f >= 0.85 * max(filled))
