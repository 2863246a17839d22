"""Plans of FlashInfer's kernels for latents, all from host lengths, and how much one holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from sglang_dcp.layers.backends.flashinfer import indptr

# Rows (query tokens x heads) of one tile of a thread-block cluster.
_TILE, _SMALL_TILE = 128, 64
# Of a plan, by its buffers (`MLAPlan` in FlashInfer's `scheduler.cuh`), which it does not
# check; keys of at most one tile a cluster are split beyond the tiles.
_MAX_WORK, _SPLITS = 16384, 256
# BackendCapabilities multiply the number of a token, and of a head, by its stride in 32 bits.
_MAX_OFFSET = 1 << 32


def heads_at_once(queries: Sequence[int], heads: int) -> int:
    """Most heads, dividing `heads`, whose tiles fit into one plan.

    Raises
    ------
    ValueError
        For more tokens than fit with one head.
    """
    for parts in range(1, heads + 1):
        if heads % parts == 0 and _work(queries, heads // parts) <= _MAX_WORK:
            return heads // parts
    raise ValueError(f"{sum(queries)} tokens do not fit into a FlashInfer MLA plan")


def _work(queries: Sequence[int], heads: int) -> int:
    small = sum(queries) * heads // len(queries) <= _SMALL_TILE
    tile = _SMALL_TILE if small else _TILE
    return sum(-(-length * heads // tile) for length in queries) + _SPLITS


def check_int32_strides(queries: torch.Tensor) -> None:
    """RuntimeError for queries [tokens, heads, dim] that kernels would read elsewhere."""
    spans = zip(queries.shape[:2], queries.stride())
    if any(count * stride >= _MAX_OFFSET for count, stride in spans):
        raise RuntimeError(
            f"queries {tuple(queries.shape)} with strides {queries.stride()} are more than "
            "FlashInfer's MLA kernels address: use a smaller --chunked-prefill-size"
        )


class Sizes(NamedTuple):
    """What a plan is made of beside lengths."""

    heads: int  # of the attn_tp shard
    latent_dim: int
    rope_dim: int
    scaling: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    device: torch.device


def plan_pages(
    wrapper: Any,
    sizes: Sizes,
    heads: int,
    queries: Iterable[int],
    lens: torch.Tensor,
    pages: torch.Tensor,
) -> None:
    """Keys in pages of the pool, not causal.

    `lens` [requests] on the host; `pages` [requests or more, width] int32: a request's
    first page is at its row, which the kernel takes for an offset into all of them.
    """
    starts = torch.arange(len(lens) + 1, dtype=torch.int32) * pages.shape[1]
    where = indptr(queries), starts, pages.view(-1), lens.to(torch.int32)
    dims = heads, sizes.latent_dim, sizes.rope_dim, sizes.page_size
    wrapper.plan(*where, *dims, False, sizes.scaling, sizes.dtype, sizes.kv_dtype)


def plan_rows(wrapper: Any, sizes: Sizes, heads: int, queries: Iterable[int]) -> None:
    """Keys in the model's dtype, one a query, as pages of one; causal."""
    ends = indptr(queries)
    rows = torch.arange(int(ends[-1]), dtype=torch.int32, device=sizes.device)
    dims = heads, sizes.latent_dim, sizes.rope_dim, 1
    where = ends, ends, rows, ends.diff()
    wrapper.plan(*where, *dims, True, sizes.scaling, sizes.dtype, sizes.dtype)


def plan_mha(
    wrapper: Any,
    queries: Iterable[int],
    keys: Iterable[int],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool,
) -> None:
    """K and V of every query head; `sizes` is heads, qk_dim and v_dim."""
    heads, qk_dim, v_dim = sizes
    wrapper.plan(
        indptr(queries),
        indptr(keys),
        heads,
        heads,
        qk_dim,
        head_dim_vo=v_dim,
        causal=causal,
        q_data_type=dtype,
    )


def sizes_of(runner: Any) -> Sizes:
    """What SGLang's FlashInfer backend reads of the runner for its plans."""
    from sglang.srt.runtime_context import get_parallel

    model = runner.model_config
    return Sizes(
        model.num_attention_heads // get_parallel().attn_tp_size,
        model.kv_lora_rank,
        model.qk_rope_head_dim,
        model.scaling,
        runner.dtype,
        runner.kv_cache_dtype,
        runner.page_size,
        runner.req_to_token_pool.req_to_token.device,
    )
