"""The KV pool of one rank under a scheduler that counts logical tokens.

SGLang's `page_size` (set in `server_args.finish`) and `max_total_num_tokens` (set below)
are logical. So allocator, radix tree, admission, leak check, usage and metrics all count
the same tokens. Only the tensors that hold K and V have a `dcp_size`-th of these rows.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Callable, Optional

import torch

from sglang_dcp.config import DcpConfig, DcpConfigError, dcp_of
from sglang_dcp.context import get_context
from sglang_dcp.layers.backends.attention_calls import as_stored
from sglang_dcp.layers.memory_report import admit_prompts
from sglang_dcp.layers.table_memory import added_table_bytes, tokens_beside_tables
from sglang_dcp.releases.api import sglang_api

logger = logging.getLogger(__name__)


def config_from_budget(
    result: Any, kvc: Any, budget_bytes: int, *args: Any, **kwargs: Any
) -> Any:
    """Hook: `KVCacheConfigurator.config_from_budget`; counts the tokens of all ranks.

    The pool leaves room for the tables that a server without DCP does not have.

    Raises
    ------
    DcpConfigError
        These tables leave no room for a pool.
    """
    config = dcp_of(kvc.server_args)
    if config is None:
        return result
    tokens = _tokens_beside_tables(
        kvc, budget_bytes, result.max_total_num_tokens, config
    )
    return dataclasses.replace(result, max_total_num_tokens=tokens * config.dcp_size)


def _tokens_beside_tables(
    kvc: Any, budget_bytes: int, tokens: int, config: DcpConfig
) -> int:
    """Return how many of one rank's `tokens` fit into the budget beside the tables."""
    from sglang.srt.model_executor.pool_configurator import (
        create_memory_pool_configurator,
    )

    page = config.logical_page_size
    whole = create_memory_pool_configurator(kvc).calculate_pool_sizes(
        budget_bytes, page
    )
    token_bytes = budget_bytes / whole.max_total_num_tokens
    tables = _tables_of(kvc, tokens, config)
    left = tokens_beside_tables(tokens, page, token_bytes, budget_bytes, tables)
    context_len, taken = kvc.model_config.context_len, tables(left)
    if not left:
        raise DcpConfigError(
            f"--context-length {context_len}: the tables of requests take "
            f"{taken / 1e9:.1f} GB, and the KV pool may have {budget_bytes / 1e9:.1f} GB "
            "with them; set --max-running-requests, or a shorter --context-length"
        )
    if taken >= 1e9 and get_context().tp_rank == 0:
        logger.info(
            "DCP: the KV pool leaves %.1f GB for tables of requests at --context-length "
            "%d; a smaller --max-running-requests needs less",
            taken / 1e9,
            context_len,
        )
    return left


def _tables_of(kvc: Any, most: int, config: DcpConfig) -> Callable[[int], int]:
    """Return how many bytes of tables DCP adds to a pool of so many tokens of a rank."""
    args = sglang_api().resolved(kvc.server_args)
    # A draft model's backend has a local table of its own.
    local_tables = 1 if args.speculative_draft_model_path is None else 2
    more = kvc.model_config.context_len, config.dcp_size, local_tables
    if args.max_running_requests is not None:
        # It hardly depends on the pool then, and SGLang logs where it does.
        named = kvc.resolve_max_num_reqs(most * config.dcp_size)
        return lambda tokens: added_table_bytes(named, named, *more)
    without_dcp = kvc.resolve_max_num_reqs(most)

    def tables(tokens: int) -> int:
        requests = kvc.resolve_max_num_reqs(tokens * config.dcp_size)
        return added_table_bytes(requests, without_dcp, *more)

    return tables


# Indices into the tuple that `TpModelWorker.get_worker_info` returns.
_TOKENS, _INPUT_BOUND = 0, 5


def bound_input(info: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """Hook: `TpModelWorker.get_worker_info`; rejects prompts that could never start.

    SGLang starts a prompt only if its pages and one more page are less than the pool. It
    accepts longer prompts, which then wait for ever and block all that follow
    (sgl-project/sglang#28530). That needs pages of more than one token, which logical
    pages always are. Without chunked prefill, prompts whose prefill does not fit into the
    memory that is left are rejected too.

    Raises
    ------
    DcpConfigError
        The pool, or the memory that is left for a prefill, is too small for any request.
    """
    config = dcp_of(worker.server_args)
    if config is None:
        return info
    page = config.logical_page_size
    pages = info[_TOKENS] // page
    bound = min(info[_INPUT_BOUND], (pages - 2) * page)
    if bound <= 0:
        raise DcpConfigError(
            f"--max-total-tokens: {info[_TOKENS]} KV tokens are {pages} pages of "
            f"{page} (page-size x dcp-size), too few for any request; give the pool "
            "more memory, or use a smaller --page-size"
        )
    bound = admit_prompts(worker.model_runner, config, bound)
    if bound <= 0:
        raise DcpConfigError(
            "--chunked-prefill-size -1: the GPU memory that is left is too small for the "
            "prefill of any prompt; use chunked prefill or a smaller --mem-fraction-static"
        )
    return (*info[:_INPUT_BOUND], bound, *info[_INPUT_BOUND + 1 :])


def explain_input_bound(
    message: Optional[str], req: Any, max_req_input_len: int, *args: Any
) -> Optional[str]:
    """Hook: `validate_input_length`; names the bound and its cause.

    SGLang's message says "exceeds" also for a prompt that is as long as the bound.
    """
    from sglang_dcp.context import find_context

    context = find_context()
    if message is None or context is None:
        return message
    page = context.config.logical_page_size
    return (
        f"Input length ({len(req.origin_input_ids)} tokens) must be below "
        f"{max_req_input_len} tokens. The limit comes from the context length, from "
        f"the KV pool without its last two pages of {page} tokens (page-size x dcp-size), "
        "and with --chunked-prefill-size -1 from the GPU memory left for a prefill. "
        "Use a shorter input, more memory, a smaller --page-size, or chunked prefill"
    )


def build_kv_pool(
    original: Callable[..., Any],
    kvc: Any,
    *,
    max_total_num_tokens: int,
    **kwargs: Any,
) -> Any:
    """Hook: `_build_mha_kv_pool` and `_build_mla_kv_pool`; allocates one rank's share.

    Raises
    ------
    DcpConfigError
        The attention backend cannot read the KV-cache dtype of the checkpoint.
    """
    config = dcp_of(kvc.server_args)
    if config is None:
        return original(kvc, max_total_num_tokens=max_total_num_tokens, **kwargs)
    _check_kv_dtype(kvc)
    local = max_total_num_tokens // config.dcp_size
    pool = original(kvc, max_total_num_tokens=local, **kwargs)
    pool.page_size = config.page_size
    if get_context().tp_rank == 0:
        logger.info(
            "DCP layout: %d ranks = attn_tp %d x dcp %d%s, comm backend %s, "
            "Q projection %s, attention backend %s, page %d, "
            "KV tokens: %d per rank, %d in all",
            config.tp_size,
            config.attn_tp_size,
            config.dcp_size,
            _of_replicas(config.layout.replicas),
            config.comm_backend,
            "replicated" if config.replicate_q_proj else "gathered",
            sglang_api().resolved(kvc.server_args).attention_backend,
            config.page_size,
            local,
            max_total_num_tokens,
        )
    return pool


def _of_replicas(replicas: int) -> str:
    return f" in each of {replicas} replicas" if replicas > 1 else ""


def _check_kv_dtype(kvc: Any) -> None:
    """Raise if the backend cannot read the KV-cache dtype.

    SGLang settles `--kv-cache-dtype auto` only after the weights are read. A config that
    was not on the disk at start may say now that it means fp8.
    """
    from sglang_dcp.layers.backends.capabilities import Requirement
    from sglang_dcp.layers.backends.registry import find_mismatch

    args = sglang_api().resolved(kvc.server_args)
    mla = kvc.use_mla_backend
    need = Requirement(args.device, mla, kvc.model_dtype, kv_dtype=kvc.kv_cache_dtype)
    problem = find_mismatch(args.attention_backend, need)
    if problem is not None:
        raise DcpConfigError(
            f"--kv-cache-dtype {args.kv_cache_dtype} means {problem.value} for this "
            f"checkpoint: {problem.reason}; use another --attention-backend, or a "
            "checkpoint without a KV-cache dtype of its own"
        )


def enable_fused_set_kv_buffer(
    original: Callable[[Any], bool], forward_batch: Any
) -> bool:
    """Hook: `enable_fused_set_kv_buffer`; off with DCP.

    The fused RoPE kernel would write K/V to logical slots.
    """
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
    """Write new tokens to this rank's pool.

    If the layer has scales, K and V are divided by them in place. Latents are written as
    they are.

    Parameters
    ----------
    slots : Tensor [tokens] int64
        Local slots.
    k, v : Tensor [tokens, local K/V heads, dim]
        New keys and values.
    k_rope : Tensor, optional
        Rotary part of MLA's keys. `k` is then the latent part.
    """
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if k_rope is not None:
        pool.set_mla_kv_buffer(layer, slots, k, k_rope)
        return
    k_scale, v_scale = _scales(pool, layer)
    scales = {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}
    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v, **scales)


def as_read(
    pool: Any,
    layer: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    k_rope: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Round new rows as those are that later tokens read from the pool.

    Arguments are those of `write_kv`. Shapes and dtypes stay. Nothing is done where the
    pool has the dtype of the model.
    """
    k_scale, v_scale = _scales(pool, layer)
    if k_rope is not None:
        k_rope = as_stored(k_rope, pool.dtype)
    k, v = _as_read(k, pool.dtype, k_scale), _as_read(v, pool.dtype, v_scale)
    return k, v, k_rope


def _as_read(
    rows: torch.Tensor, stored: torch.dtype, scale: Optional[torch.Tensor]
) -> torch.Tensor:
    if scale is None or stored.itemsize >= rows.itemsize:
        return as_stored(rows, stored)
    # Kernels multiply by the scale in float32.
    return (as_stored(rows / scale, stored).float() * scale).to(rows.dtype)


def _scales(pool: Any, layer: Any) -> tuple[Optional[Any], Optional[Any]]:
    """Return by what K and V are divided before they are stored, None for nothing.

    Any fp8 checkpoint gives its layers scales. SGLang's pool of latents takes none.
    """
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if layer.k_scale is None or isinstance(pool, MLATokenToKVPool):
        return None, None
    return layer.k_scale, layer.v_scale
