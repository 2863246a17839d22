"""Hooks of `/metrics` and `/server_info`: what a rank with DCP reads, writes and uses."""

from __future__ import annotations

from typing import Any

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import find_context

# Attribute of SGLang's reporter: what a replicated Q projection adds to a decode token.
_ADDED = "dcp_added_per_decode_token"


def init_metrics_reporter(
    result: Any, scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook: `Scheduler.init_metrics_reporter`; corrects estimates and adds metrics.

    The KV pool and the exchange exist by then.
    """
    context = find_context()
    if context is None:
        return result
    reporter = scheduler.metrics_reporter
    if reporter.enable_mfu_metrics:
        _correct_estimates(reporter, scheduler, context.config.dcp_size)
    if reporter.current_scheduler_metrics_enabled:
        exchange = _runner(scheduler).attn_backend.exchange
        _export(scheduler.metrics_collector, exchange, context.config)
    return result


def estimate_decode_perf(
    result: tuple[float, float, float],
    reporter: Any,
    batch: Any,
    num_tokens: int,
) -> tuple[float, float, float]:
    """Hook: `_estimate_decode_perf`; adds the replicated part of the Q projection.

    The estimate is FLOPs, bytes read and bytes written. Only decode uses that part.
    """
    added = getattr(reporter, _ADDED, None)
    if added is None or num_tokens <= 0:
        return result
    flops, read_bytes, write_bytes = result
    return (
        flops + num_tokens * added.flops,
        read_bytes + num_tokens * added.read_bytes,
        write_bytes + num_tokens * added.write_bytes,
    )


def get_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: `Scheduler.get_internal_state`; shows layout, exchange and memory.

    SGLang's own DCP is off in a scheduler, so its arguments there say `dcp_size` 1.
    """
    context = find_context()
    if context is None:
        return result
    config = context.config
    runner = _runner(scheduler)
    exchange = runner.attn_backend.exchange
    result.internal_state.update(
        dcp_size=config.dcp_size,
        attn_tp_size=config.attn_tp_size,
        dcp_comm_backend=config.comm_backend,
        dcp_replicate_q_proj=config.replicate_q_proj,
        dcp_exchange_in_use=exchange.in_use,
        dcp_exchange_fallbacks=exchange.fallbacks.counts,
        dcp_attention_memory_bytes=runner.dcp_forward_memory,
    )
    return result


def _runner(scheduler: Any) -> Any:
    return scheduler.tp_worker.model_runner


def _correct_estimates(reporter: Any, scheduler: Any, dcp_size: int) -> None:
    """Make SGLang's constants those of one rank and one logical token.

    Its own cached bytes are of K/V heads, of which SGLang sees `dcp_size` times as many.
    For latents it counts heads, where the pool holds one row. The pool knows better.
    FLOPs stay as they are: a rank has `dcp_size` times the heads, over a `dcp_size`-th of
    the positions.
    """
    from sglang_dcp.layers.estimates import kv_bytes_per_token, replicated_per_token

    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    reporter._kv_cache_bytes_per_token = kv_bytes_per_token(pool, dcp_size)
    # The kernel of a decode step reads the queries of the whole DCP group.
    reporter._decode_q_read_bytes_per_token *= dcp_size
    replicas = getattr(_runner(scheduler), "dcp_q_replicas", None)
    if replicas is not None:
        added = replicated_per_token(replicas.own_products(), dcp_size)
        setattr(reporter, _ADDED, added)


def _export(collector: Any, exchange: Any, config: DcpConfig) -> None:
    """Add the layout as a gauge of 1, and the fallbacks of the exchange as a counter.

    SGLang serves `/metrics` from files of several processes. Prometheus' own type for
    such a gauge does not work there.
    """
    # Not at module level: it reads where these files lie when it is imported.
    import prometheus_client

    layout = {
        "dcp_size": str(config.dcp_size),
        "attn_tp_size": str(config.attn_tp_size),
        "comm_backend": config.comm_backend,
        "exchange_in_use": exchange.in_use,
        "q_proj": "replicated" if config.replicate_q_proj else "gathered",
    }
    gauge = (collector._gauge_cls or prometheus_client.Gauge)(
        name="sglang:dcp_info",
        documentation="Layout of decode context parallelism, and the exchange in use.",
        labelnames=[*collector.labels, *layout],
        multiprocess_mode="mostrecent",
    )
    gauge.labels(**collector.labels, **layout).set(1)
    counter = (collector._counter_cls or prometheus_client.Counter)(
        name="sglang:dcp_exchange_fallbacks_total",
        documentation="Exchanges that did not use the comm backend asked for.",
        labelnames=[*collector.labels, "reason"],
    )

    def count(reason: str, times: int) -> None:
        counter.labels(**collector.labels, reason=reason).inc(times)

    for reason in exchange.fallback_reasons:
        count(reason, 0)
    exchange.fallbacks.observe(count)
