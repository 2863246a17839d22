"""What `/metrics`, `/server_info` and KV events say of a server with DCP.

Only this file compares SGLang's estimates with the positions that a rank holds, and a
published block with the logical page.
"""

from __future__ import annotations

import array
import hashlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator

import pytest
import torch

from helpers.backend_ranks import sglang_context
from helpers.gloo_ranks import run_python
from helpers.parallel import attention_width
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.exchange.fallbacks import Fallbacks
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import metrics
from sglang_dcp.layers.estimates import (
    Product,
    kv_bytes_per_token,
    replicated_per_token,
)
from sglang_dcp.layers.kv_pool import write_kv
from sglang_dcp.releases.api import sglang_api

LAYERS, HEAD_DIM, Q_HEADS, HIDDEN = 3, 8, 8, 32
LATENT, ROPE = 12, 4
SIZES = "tp, attn_tp, kv_heads"
# K/V heads: fewer than ranks, as many as attention-TP, more than that.
LAYOUTS = [(2, 1, 1), (4, 2, 2), (4, 2, 4), (6, 2, 2)]


def make_pool(heads: int | None, dtype: torch.dtype, slots: int) -> Any:
    """SGLang's pool of one rank, of `heads` K/V heads or of latents."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    sizes = (slots, 1, dtype)
    if heads is None:
        return MLATokenToKVPool(*sizes, LATENT, ROPE, LAYERS, "cpu", False)
    return MHATokenToKVPool(*sizes, heads, HEAD_DIM, LAYERS, "cpu", False)


def buffers_of(pool: Any) -> list[torch.Tensor]:
    parts = [pool.kv_buffer] if hasattr(pool, "kv_buffer") else []
    parts = parts or [pool.k_buffer, pool.v_buffer]
    return [buffer.view(torch.uint8) for part in parts for buffer in part]


def bytes_of_a_prompt(
    heads: int | None, dtype: torch.dtype, tokens: int, dcp_size: int
) -> float:
    """Write `tokens` to the pools of all ranks, and count bytes. Returns a rank's mean."""
    total = 0
    for rank in range(dcp_size):
        pool = make_pool(heads, dtype, 16)
        for buffer in buffers_of(pool):
            buffer.fill_(0x55)
        for position in range(rank, tokens, dcp_size):
            slot = torch.tensor([1 + position // dcp_size])
            for layer_id in range(LAYERS):
                layer = SimpleNamespace(layer_id=layer_id, k_scale=None, v_scale=None)
                shape = (1, heads or 1, LATENT + ROPE if heads is None else HEAD_DIM)
                # No byte of a 1 is 0x55, in any of these dtypes.
                keys = torch.ones(shape).to(dtype)
                write_kv(pool, layer, slot, keys, keys.clone())
        total += sum(int((buffer != 0x55).sum()) for buffer in buffers_of(pool))
    return total / dcp_size


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("heads", [None, 1, 2], ids=["mla", "1kv", "2kv"])
@pytest.mark.parametrize("dcp_size", [2, 3])
def test_cached_bytes_are_those_that_a_rank_writes(
    dcp_size: int, heads: int | None, dtype: torch.dtype
) -> None:
    tokens = 4 * dcp_size
    with sglang_context("cpu"):
        written = bytes_of_a_prompt(heads, dtype, tokens, dcp_size)
        pool = make_pool(heads, dtype, 16)
        assert tokens * kv_bytes_per_token(pool, dcp_size) == written


@contextmanager
def reporter_of(
    tp: int, kv_heads: int, attn_tp: int | None, latent: bool = False
) -> Iterator[Any]:
    """SGLang's reporter with its estimates, in a scheduler with DCP or without."""
    from sglang.srt.managers.scheduler_components.metrics_reporter import (
        SchedulerMetricsReporter,
    )

    dcp = tp // attn_tp if attn_tp else 1
    seen = kv_heads * (1 if latent else dcp)
    heads = max(1, seen // tp)
    model = SimpleNamespace(
        hidden_size=HIDDEN,
        num_attention_layers=LAYERS,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
        get_num_attention_heads=lambda ranks: Q_HEADS // ranks,
        get_num_kv_heads=lambda ranks, *_: max(1, seen // ranks),
        hf_text_config=SimpleNamespace(intermediate_size=64),
    )
    with sglang_context("cpu"), attention_width(tp):
        pool = make_pool(None if latent else heads, torch.bfloat16, 16)
        reporter = object.__new__(SchedulerMetricsReporter)
        scheduler = SimpleNamespace(
            model_config=model,
            metrics_reporter=reporter,
            ps=SimpleNamespace(tp_size=tp),
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            tp_worker=SimpleNamespace(model_runner=SimpleNamespace()),
        )
        reporter.scheduler = scheduler
        reporter.enable_mfu_metrics = True
        reporter.current_scheduler_metrics_enabled = False
        reporter._init_estimated_perf_constants()
        if attn_tp:
            set_context(DcpContext(DcpConfig(Layout(tp, attn_tp)), 0))
        metrics.init_metrics_reporter(None, scheduler)
        yield reporter
        clear_context()


def decode(reporter: Any, *lengths: int) -> tuple[float, float, float]:
    """FLOPs, bytes read and bytes written of one decode step."""
    batch = SimpleNamespace(seq_lens_cpu=torch.tensor(lengths))
    flops, read_bytes, written = reporter._estimate_decode_perf(batch, len(lengths))
    return flops, read_bytes, written


def prefill(reporter: Any, prefix: int, tokens: int) -> tuple[float, ...]:
    batch = SimpleNamespace(extend_lens=[tokens], prefix_lens=[prefix])
    return tuple(reporter._estimate_prefill_perf(batch))


def held_by_a_rank(length: int, dcp: int) -> float:
    """Positions of a request on one rank, on average."""
    owned = [sum(p % dcp == rank for p in range(length)) for rank in range(dcp)]
    return sum(owned) / dcp


@pytest.mark.parametrize(SIZES, LAYOUTS)
def test_a_decode_step_is_what_a_rank_does(
    tp: int, attn_tp: int, kv_heads: int
) -> None:
    dcp, itemsize = tp // attn_tp, 2
    lengths, more = (1000, 17), (1200, 17)
    heads, q_values = kv_heads // attn_tp, Q_HEADS // tp * HEAD_DIM
    row = LAYERS * heads * 2 * HEAD_DIM * itemsize
    with reporter_of(tp, kv_heads, attn_tp) as reporter:
        done, longer = decode(reporter, *lengths), decode(reporter, *more)
        reporter._kv_cache_bytes_per_token = 0.0
        reporter._decode_q_read_bytes_per_token = 0.0
        rest = decode(reporter, *lengths)
    kept = sum(held_by_a_rank(length, dcp) for length in lengths)
    # The kernel reads the queries of all heads of the DCP group.
    queries = len(lengths) * LAYERS * q_values * dcp * itemsize
    assert done[1] - rest[1] == pytest.approx(kept * row + queries)
    # Each new token is written by one rank.
    assert done[2] - rest[2] == pytest.approx(len(lengths) * row / dcp)
    # Heads of the group x positions of the rank, a product for K and one for V.
    pairs = Q_HEADS // tp * dcp * held_by_a_rank(more[0] - lengths[0], dcp)
    assert longer[0] - done[0] == pytest.approx(pairs * 4 * HEAD_DIM * LAYERS)


@pytest.mark.parametrize("latent", [False, True], ids=["gqa", "mla"])
def test_1000_tokens_in_and_200_out_move_no_more_than_without_dcp(latent: bool) -> None:
    totals = []
    for attn_tp in (1, None):
        with reporter_of(2, 8 if latent else 1, attn_tp, latent) as reporter:
            steps = [prefill(reporter, 0, 1000)]
            steps += [decode(reporter, 1000 + step) for step in range(1, 200)]
        totals.append([sum(values) for values in zip(*steps)])
    with_dcp, plain = totals
    assert with_dcp[0] == plain[0]
    assert with_dcp[1] < plain[1] and with_dcp[2] < plain[2]


def test_latents_count_as_the_pool_holds_them() -> None:
    """SGLang's own constant counts K and V of heads."""
    with reporter_of(4, 8, 1, latent=True) as reporter:
        assert reporter._kv_cache_bytes_per_token == LAYERS * (LATENT + ROPE) * 2 / 4


def test_without_dcp_estimates_stay() -> None:
    with reporter_of(2, 1, None) as reporter:
        assert reporter._kv_cache_bytes_per_token == LAYERS * 2 * HEAD_DIM * 2
        assert decode(reporter, 5) == metrics.estimate_decode_perf(
            decode(reporter, 5), reporter, None, 1
        )


@pytest.mark.parametrize("dcp", [2, 4])
def test_replicated_weights_are_read_and_computed_with(dcp: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    own = torch.zeros(6, 5, dtype=torch.bfloat16)  # [out, in]
    w_kc = torch.zeros(2, 3, 4)  # [heads, in, out]

    def flops_and_outputs(times: int) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            q = torch.zeros(1, 5, dtype=own.dtype) @ own.repeat(times, 1).T
            absorbed = torch.bmm(torch.zeros(2 * times, 1, 3), w_kc.repeat(times, 1, 1))
        return counter.get_total_flops(), q.nbytes + absorbed.nbytes

    sharded, replicated = flops_and_outputs(1), flops_and_outputs(dcp)
    products = [
        Product(5, 6, own.nbytes, own.dtype),
        Product(3, 2 * 4, w_kc.nbytes, w_kc.dtype),
    ]
    added = replicated_per_token(products, dcp)
    assert added.flops == replicated[0] - sharded[0]
    assert added.write_bytes == replicated[1] - sharded[1]
    assert added.read_bytes == (own.nbytes + w_kc.nbytes) * (dcp - 1)
    reporter = SimpleNamespace(**{metrics._ADDED: added})
    base = (10.0, 20.0, 30.0)
    seen = metrics.estimate_decode_perf(base, reporter, None, 3)
    assert seen == tuple(value + 3 * more for value, more in zip(base, added))
    assert metrics.estimate_decode_perf(base, reporter, None, 0) == base


class FakeExchange:
    """An exchange that fell back once before anyone looked."""

    in_use = "a2a"
    fallback_reasons = ("capacity", "rendezvous")

    def __init__(self) -> None:
        self.fallbacks = Fallbacks()
        self.fallbacks.add("rendezvous")


def scheduler_with(exchange: Any) -> Any:
    backend = SimpleNamespace(exchange=exchange)
    runner = SimpleNamespace(attn_backend=backend, dcp_forward_memory=7)
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))


def test_internal_state_shows_layout_and_exchange() -> None:
    answer = SimpleNamespace(
        internal_state={"dcp_size": 1, "dcp_comm_backend": "ag_rs"}
    )
    before = dict(answer.internal_state)
    scheduler = scheduler_with(FakeExchange())
    assert metrics.get_internal_state(answer, scheduler) is answer
    assert answer.internal_state == before
    set_context(DcpContext(DcpConfig(Layout(8, 2), "symm_a2a", True), 0))
    metrics.get_internal_state(answer, scheduler, "request")
    assert answer.internal_state == {
        "dcp_size": 4,
        "attn_tp_size": 2,
        "dcp_comm_backend": "symm_a2a",
        "dcp_replicate_q_proj": True,
        "dcp_exchange_in_use": "a2a",
        "dcp_exchange_fallbacks": {"rendezvous": 1},
        "dcp_attention_memory_bytes": 7,
    }


EXPORT = """
import os, sys
from types import SimpleNamespace
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.exchange.fallbacks import Fallbacks
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import metrics

exchange = SimpleNamespace(
    in_use="symm_a2a", fallback_reasons=("capacity", "dtype"), fallbacks=Fallbacks()
)
exchange.fallbacks.add("capacity")
labels = {"model_name": "m", "tp_rank": 0}
collector = SimpleNamespace(labels=labels, _gauge_cls=None, _counter_cls=None)
# A scheduler is another process than the one that answers.
if os.fork() == 0:
    config = DcpConfig(Layout(4, 2), "symm_a2a")
    metrics._export(collector, exchange, config)
    exchange.fallbacks.add("capacity")
    os._exit(0)
os.wait()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_metrics_of_a_scheduler_reach_the_process_that_answers(tmp_path: Path) -> None:
    done = run_python("-c", EXPORT, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert done.code == 0, done.stderr[-2000:]
    [info] = [line for line in done.stdout.splitlines() if "dcp_info{" in line]
    assert info.endswith(" 1.0")
    for label in (
        'dcp_size="2"',
        'attn_tp_size="2"',
        'comm_backend="symm_a2a"',
        'exchange_in_use="symm_a2a"',
        'q_proj="gathered"',
        'model_name="m"',
    ):
        assert label in info
    counts = [line for line in done.stdout.splitlines() if "fallbacks_total{" in line]
    assert {line.partition('reason="')[2] for line in counts} == {
        'capacity",tp_rank="0"} 2.0',
        'dtype",tp_rank="0"} 0.0',
    }


@pytest.mark.parametrize("dcp_size", [2, 4])
def test_kv_events_are_of_logical_pages(
    dcp_size: int, server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router hashes prompts by the block size of `/server_info`."""
    from sglang.srt.mem_cache import utils

    # SGLang's own needs a compiler.
    monkeypatch.setattr(utils, "get_native_hash", hash_pages)
    page = 4 * dcp_size
    events = {"publisher": "zmq", "endpoint": "tcp://*:5557"}
    args = server_args(
        tp_size=4,
        dcp_size=dcp_size,
        page_size=4,
        kv_events_config=json.dumps(events),
    )
    shown = describe_publisher(args)
    assert (shown["block_size"], shown["dp_size"]) == (page, 1)
    tokens = list(range(100, 100 + 3 * page + 1))
    stored = events_of_a_prompt(tokens, sglang_api().resolved(args).page_size)
    assert {event.block_size for event in stored} == {page}
    published = [token for event in stored for token in event.token_ids]
    assert published == tokens[: 3 * page]
    assert sum(len(event.block_hashes) for event in stored) == 3


def hash_pages(token_ids: Any, prior: Any, page_size: int | None = None) -> Any:
    """A hash of each page, or of all tokens, from their number alone."""
    pages = -(-len(token_ids) // page_size) if page_size else 1
    seeds = [f"{prior}{len(token_ids)}{page}".encode() for page in range(pages)]
    hashes = [hashlib.sha256(seed).hexdigest() for seed in seeds]
    return hashes if page_size else hashes[0]


def describe_publisher(args: Any) -> Any:
    """What `/server_info` says in the process that answers, before any scheduler."""
    if hasattr(args, "describe_kv_events_publisher"):
        return args.describe_kv_events_publisher()
    from sglang.srt.runtime_context import describe_kv_events_publisher

    return describe_kv_events_publisher(args)


def events_of_a_prompt(tokens: list[int], page: int) -> list[Any]:
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    allocator: Any = SimpleNamespace(device="cpu", page_size=page)
    pool: Any = None
    cache = RadixCache(
        CacheInitParams(False, pool, allocator, page, enable_kv_cache_events=True)
    )
    cache.take_events()
    key = RadixKey(array.array("q", tokens))
    cache.insert(InsertParams(key=key, value=torch.arange(len(tokens))))
    return list(cache.take_events())


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
