"""The KV pool of one rank under a scheduler that counts logical tokens.

SGLang's `page_size` (`server_args.finish`) and `max_total_num_tokens` (below) are logical:
allocator, radix tree, admission, leak check, usage and metrics then all speak of the same
tokens. Only the tensors that hold K and V are a `dcp_size`-th of it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Callable, Optional

import torch

from sglang_dcp.config import DcpConfigError, dcp_of

logger = logging.getLogger(__name__)


def config_from_budget(result: Any, kvc: Any, *args: Any, **kwargs: Any) -> Any:
    """Seam: `KVCacheConfigurator.config_from_budget`, from one rank's tokens to all."""
    config = dcp_of(kvc.server_args)
    if config is None:
        return result
    tokens = result.max_total_num_tokens
    return dataclasses.replace(result, max_total_num_tokens=tokens * config.dcp_size)


# Of what a worker tells its scheduler.
_TOKENS, _INPUT_BOUND = 0, 5


def bound_input(info: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """Seam: `TpModelWorker.get_worker_info`, no prompt that could never be admitted.

    SGLang admits a prompt whose whole pages and one page more are less than the pool, and
    lets one that it takes in but cannot admit wait, with all that come after (its issue
    28530). A page has more than one token here, whatever `--page-size` says.
    """
    args = worker.server_args
    if dcp_of(args) is None:
        return info
    pages = info[_TOKENS] // args.page_size
    bound = min(info[_INPUT_BOUND], (pages - 2) * args.page_size)
    if bound <= 0:
        raise DcpConfigError(
            f"--max-total-tokens: {info[_TOKENS]} KV tokens are {pages} pages of "
            f"{args.page_size} (page size x KVP), too few for any request; give the pool "
            "more memory, or use a smaller --page-size"
        )
    return (*info[:_INPUT_BOUND], bound, *info[_INPUT_BOUND + 1 :])


def build_kv_pool(
    original: Callable[..., Any],
    kvc: Any,
    *,
    max_total_num_tokens: int,
    **kwargs: Any,
) -> Any:
    """Seam: `_build_mha_kv_pool` and `_build_mla_kv_pool`, a rank's share of the rows."""
    config = dcp_of(kvc.server_args)
    if config is None:
        return original(kvc, max_total_num_tokens=max_total_num_tokens, **kwargs)
    _check_kv_dtype(kvc)
    local = max_total_num_tokens // config.dcp_size
    pool = original(kvc, max_total_num_tokens=local, **kwargs)
    pool.page_size = config.page_size
    if kvc.ps.tp_rank == 0:
        logger.info(
            "DCP layout: %d ranks = attn_tp %d x KVP %d, comm backend %s, "
            "Q projection %s, attention backend %s, page %d, "
            "KV tokens: %d per rank, %d in all",
            config.tp_size,
            config.attn_tp_size,
            config.dcp_size,
            config.comm_backend,
            "replicated" if config.replicate_q_proj else "gathered",
            kvc.server_args.attention_backend,
            config.page_size,
            local,
            max_total_num_tokens,
        )
    return pool


def _check_kv_dtype(kvc: Any) -> None:
    """Now the weights are read, and `--kv-cache-dtype auto` has its meaning."""
    from sglang_dcp.layers.adaptors.registry import Need, unmet

    args = kvc.server_args
    mla = kvc.use_mla_backend
    need = Need(args.device, mla, kvc.model_dtype, kv_dtype=kvc.kv_cache_dtype)
    problem = unmet(args.attention_backend, need)
    if problem is not None:
        raise DcpConfigError(
            f"--kv-cache-dtype {args.kv_cache_dtype} means {problem.value} for this "
            f"checkpoint: {problem.reason}; use another --attention-backend, or a "
            "checkpoint without a KV-cache dtype of its own"
        )


def enable_fused_set_kv_buffer(
    original: Callable[[Any], bool], forward_batch: Any
) -> bool:
    """Seam: K/V writes go through the attention backend, never the fused RoPE kernel."""
    from sglang_dcp.context import find_context

    return find_context() is None and original(forward_batch)


def write_kv(
    pool: Any,
    layer: Any,
    slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_rope: Optional[torch.Tensor] = None,
) -> None:
    """Write new tokens to `slots` of this rank's pool; with scales, K and V are divided.

    `k_rope` is the rotary part of MLA's keys where they come in two parts. Latents are
    written as they are.
    """
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MLATokenToKVPool

    if k_rope is not None:
        pool.set_mla_kv_buffer(layer, slots, k, k_rope)
        return
    scales = {}
    # Any fp8 checkpoint gives its layers scales; SGLang's pool of latents takes none.
    if layer.k_scale is not None and not isinstance(pool, MLATokenToKVPool):
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v, **scales)
