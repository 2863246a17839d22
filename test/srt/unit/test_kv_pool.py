"""One rank's pool under a scheduler that counts logical tokens.

Only this file looks at the two numbers side by side: logical tokens for the scheduler
are `dcp_size` times the rows of a rank, and pages of both describe the same memory.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from helpers.backend_ranks import sglang_context
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import kv_pool
from sglang_dcp.layers.kv_pool import (
    as_read,
    bound_input,
    build_kv_pool,
    config_from_budget,
    enable_fused_set_kv_buffer,
    explain_input_bound,
    write_kv,
)
from sglang_dcp.layers.local_batch import LocalBatchBuilder

CONFIGS = {
    "dcp2": DcpConfig(Layout(4, 2), page_size=4),
    "dcp3": DcpConfig(Layout(6, 2), "a2a", True, page_size=1),
    "dcp8": DcpConfig(Layout(8, 1), page_size=16),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@dataclasses.dataclass
class Budget:
    """The part of SGLang's `MemoryPoolConfig` that matters here."""

    max_total_num_tokens: int
    max_running_requests: int = 7


@pytest.fixture(autouse=True)
def decided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of this file are what SGLang resolved."""
    api = SimpleNamespace(resolved=lambda args: args)
    monkeypatch.setattr(kv_pool, "sglang_api", lambda: api)


def configurator(config: DcpConfig | None, tp_rank: int = 0) -> Any:
    if config is not None:
        clear_context()
        set_context(DcpContext(config, tp_rank))
    args = SimpleNamespace(
        dcp=config,
        device="cuda",
        attention_backend="torch_native",
        kv_cache_dtype="auto",
        max_running_requests=None,
        speculative_draft_model_path=None,
    )
    return SimpleNamespace(
        server_args=args,
        model_config=SimpleNamespace(context_len=60),
        # SGLang's rule, with other numbers.
        resolve_max_num_reqs=lambda tokens: max(3, tokens // 60),
        kv_cache_dtype=torch.bfloat16,
        model_dtype=torch.bfloat16,
        use_mla_backend=False,
    )


class Builder:
    """SGLang's pool builder: notes how it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.pool = SimpleNamespace(page_size="logical")

    def __call__(self, kvc: Any, **kwargs: Any) -> Any:
        self.calls.append((kvc, kwargs))
        return self.pool


# Bytes of a token in a rank's pool.
CELL = 40
ROOMY = 1 << 30


@pytest.fixture(autouse=True)
def sized_by_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's sizing of a pool, whole pages."""
    from sglang.srt.model_executor import pool_configurator

    def calculate(available: int, page: int) -> Budget:
        return Budget(available // CELL // page * page)

    monkeypatch.setattr(
        pool_configurator,
        "create_memory_pool_configurator",
        lambda kvc: SimpleNamespace(calculate_pool_sizes=calculate),
    )


@each_config
def test_scheduler_sees_the_tokens_of_all_ranks(config: DcpConfig) -> None:
    budget = Budget(480)
    seen = config_from_budget(budget, configurator(config), ROOMY, cap_tokens=9)
    assert seen == Budget(480 * config.dcp_size)
    assert budget == Budget(480), "SGLang's own object is not changed"


@each_config
@pytest.mark.parametrize("draft", [None, "path"], ids=["alone", "draft"])
@pytest.mark.parametrize("requested", [None, 12], ids=["default", "named"])
def test_pool_and_tables_fit_where_a_pool_alone_fits_without_dcp(
    requested: int | None, draft: str | None, config: DcpConfig
) -> None:
    """Counts the tables by the tensors that hold them, of a pool that fills its budget."""
    budget_bytes = CELL * 48000
    kvc = configurator(config)
    kvc.server_args.speculative_draft_model_path = draft
    if requested:
        kvc.server_args.max_running_requests = requested
        kvc.resolve_max_num_reqs = lambda tokens: min(requested, tokens // 2)
    # What SGLang makes of the whole budget, with DCP and without.
    without = budget_bytes // CELL
    seen = config_from_budget(Budget(without), kvc, budget_bytes)
    local = seen.max_total_num_tokens // config.dcp_size
    assert local % (config.page_size * config.dcp_size) == 0
    requests = kvc.resolve_max_num_reqs(seen.max_total_num_tokens)
    positions = kvc.model_config.context_len + 4
    table = torch.zeros(requests + 1, positions, dtype=torch.int32)
    plain_rows = kvc.resolve_max_num_reqs(without) + 1
    plain_table = torch.zeros(plain_rows, positions, dtype=torch.int32)
    builders = [
        LocalBatchBuilder(table, config.dcp_size, 0, config.page_size)
        for _ in (["target", "draft"] if draft else ["target"])
    ]
    local_bytes = sum(builder.local_table.nbytes for builder in builders)
    taken = local * CELL + table.nbytes + local_bytes
    allowed = budget_bytes + plain_table.nbytes
    assert taken <= allowed
    # Not a page more would fit.
    pages_bytes = 2 * config.page_size * config.dcp_size * (CELL + 200)
    assert taken > allowed - pages_bytes - 65 * 8


def test_a_pool_that_the_user_made_small_keeps_its_tokens() -> None:
    seen = config_from_budget(
        Budget(64), configurator(CONFIGS["dcp2"]), 64 * CELL + 9999
    )
    assert seen.max_total_num_tokens == 128


def test_tables_that_leave_no_pool_are_refused() -> None:
    kvc = configurator(CONFIGS["dcp2"])
    kvc.model_config.context_len = 1_010_000
    with pytest.raises(DcpConfigError, match="--context-length 1010000.* take 0.0 GB"):
        config_from_budget(Budget(480), kvc, 480 * CELL)


def test_large_tables_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """2048 requests of a million positions: 4 GB for the local tables of dcp 2."""
    caplog.set_level(logging.INFO, "sglang_dcp")
    kvc = configurator(CONFIGS["dcp2"])
    kvc.model_config.context_len = 1_010_000
    kvc.resolve_max_num_reqs = lambda tokens: 2048
    seen = config_from_budget(Budget(10**9), kvc, 40 * 10**9)
    assert seen.max_total_num_tokens == pytest.approx(
        2 * (40e9 - 4.14e9) / 40, rel=0.001
    )
    [line] = caplog.messages
    assert "leaves 4.1 GB for tables of requests at --context-length 1010000" in line


def worker_of(config: DcpConfig | None) -> Any:
    return SimpleNamespace(
        server_args=SimpleNamespace(dcp=config), model_runner="runner"
    )


@each_config
def test_no_prompt_reaches_into_the_last_two_pages(
    config: DcpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def admit_prompts(*of: Any) -> int:
        asked.append(of)
        return int(of[-1])

    monkeypatch.setattr(kv_pool, "admit_prompts", admit_prompts)
    page = config.page_size * config.dcp_size
    worker = worker_of(config)
    info = 9 * page + page - 1, "prefill", "running", "queued", 77, 9 * page - 6, "seed"
    assert bound_input(info, worker) == (*info[:5], 7 * page, "seed")
    # The context may be shorter than the pool.
    short = (*info[:5], 3, "seed")
    assert bound_input(short, worker) == short
    assert asked == [("runner", config, 7 * page), ("runner", config, 3)]
    monkeypatch.setattr(kv_pool, "admit_prompts", lambda *of: 2)
    assert bound_input(info, worker) == (*info[:5], 2, "seed")
    monkeypatch.setattr(kv_pool, "admit_prompts", lambda *of: 0)
    with pytest.raises(DcpConfigError, match="prefill of any prompt; use chunked"):
        bound_input(info, worker)
    with pytest.raises(DcpConfigError, match="2 pages of .* too few for any request"):
        bound_input((2 * page, *info[1:]), worker)


@each_config
def test_a_rank_holds_its_share(config: DcpConfig) -> None:
    builder, kvc = Builder(), configurator(config)
    logical = config_from_budget(Budget(480), kvc, ROOMY).max_total_num_tokens
    pool = build_kv_pool(
        builder, kvc, max_total_num_tokens=logical, mha_pool_class=int, quant_method=3
    )
    assert pool is builder.pool and pool.page_size == config.page_size
    wanted = dict(max_total_num_tokens=480, mha_pool_class=int, quant_method=3)
    assert builder.calls == [(kvc, wanted)]


def test_off_is_the_very_same_object() -> None:
    budget, builder, kvc = Budget(480), Builder(), configurator(None)
    assert config_from_budget(budget, kvc, 1) is budget
    info = (480, 0, 0, 0, 479, 474, 0)
    assert bound_input(info, worker_of(None)) is info
    pool = build_kv_pool(builder, kvc, max_total_num_tokens=481, mha_pool_class=int)
    assert pool is builder.pool and pool.page_size == "logical"
    wanted = dict(max_total_num_tokens=481, mha_pool_class=int)
    assert builder.calls == [(kvc, wanted)]


@pytest.mark.parametrize("tp_rank", [0, 1], ids=["rank0", "rank1"])
def test_layout_is_logged_once(tp_rank: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sglang_dcp")
    kvc = configurator(CONFIGS["dcp3"], tp_rank)
    build_kv_pool(Builder(), kvc, max_total_num_tokens=900)
    if tp_rank:
        assert caplog.messages == []
        return
    [line] = caplog.messages
    for part in (
        "6 ranks = attn_tp 2 x dcp 3",
        "comm backend a2a",
        "Q projection replicated",
        "300 per rank, 900 in all",
    ):
        assert part in line


def test_fused_write_is_off_with_dcp_alone() -> None:
    asked: list[str] = []

    def original(batch: Any) -> bool:
        asked.append(batch)
        return True

    assert enable_fused_set_kv_buffer(original, "batch") is True
    set_context(DcpContext(CONFIGS["dcp2"], 0))
    assert enable_fused_set_kv_buffer(original, "batch") is False
    assert asked == ["batch"]


def test_kv_dtype_of_the_checkpoint() -> None:
    """`auto` may still mean fp8, which SGLang reads from the checkpoint."""
    kvc = configurator(DcpConfig(Layout(2, 1)))
    kvc.kv_cache_dtype = torch.float8_e4m3fn
    kvc.server_args.attention_backend = "fa3"
    build_kv_pool(Builder(), kvc, max_total_num_tokens=64)
    kvc.server_args.attention_backend = "torch_native"
    with pytest.raises(DcpConfigError, match="--kv-cache-dtype auto .*float8_e4m3fn"):
        build_kv_pool(Builder(), kvc, max_total_num_tokens=64)
    # What a backend reads of latents is another matter.
    kvc.server_args.attention_backend, kvc.use_mla_backend = "fa3", True
    with pytest.raises(DcpConfigError, match="fa3 has no kernel for fp8 latents"):
        build_kv_pool(Builder(), kvc, max_total_num_tokens=64)


def test_latents_are_written_as_they_are() -> None:
    """Each layer of an fp8 checkpoint has scales, 1.0 where it brings none."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    scale = torch.tensor(0.5)
    layer = SimpleNamespace(layer_id=0, k_scale=scale, v_scale=scale)
    keys = torch.arange(12.0).view(2, 1, 6)
    with sglang_context("cpu"):
        pool = MLATokenToKVPool(8, 1, torch.float32, 4, 2, 1, "cpu", False)
        write_kv(pool, layer, torch.tensor([3, 5]), keys.clone(), keys[..., :4])
    assert torch.equal(pool.get_key_buffer(0)[[3, 5]], keys)


@pytest.mark.parametrize("scale", [None, 0.5, 0.3, 0.0137])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16])
def test_rows_as_read_are_those_that_were_written(
    stored: torch.dtype, scale: Optional[float]
) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    scales = None if scale is None else torch.tensor(scale)
    layer = SimpleNamespace(layer_id=0, k_scale=scales, v_scale=scales)
    keys = torch.linspace(-0.9, 0.9, 2 * 2 * 8).view(2, 2, 8).bfloat16()
    values = (keys * 1.37).contiguous()
    slots = torch.tensor([3, 5])
    with sglang_context("cpu"):
        pool = MHATokenToKVPool(8, 1, stored, 2, 8, 1, "cpu", False)
        k, v, _ = as_read(pool, layer, keys, values)
        write_kv(pool, layer, slots, keys.clone(), values.clone())
    read_by = scale if scale and stored.itemsize == 1 else 1.0
    for found, kept in zip((k, v), pool.get_kv_buffer(0)):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (kept[slots].float() * read_by).bfloat16())


def test_a_prompt_as_long_as_the_bound_is_told_so() -> None:
    """SGLang's own message says that 512 tokens exceed 512."""
    req = SimpleNamespace(origin_input_ids=[1] * 512)
    theirs = "Input length (512 tokens) exceeds the maximum allowed length (512 tokens)"
    assert explain_input_bound(theirs, req, 512, False) == theirs
    set_context(DcpContext(DcpConfig(Layout(4, 2), page_size=8), tp_rank=0))
    assert explain_input_bound(None, req, 513, False) is None
    said = explain_input_bound(theirs, req, 512, False)
    assert said is not None and "must be below 512 tokens" in said
    assert "two pages of 16 tokens" in said and "exceeds" not in said
    assert "with --chunked-prefill-size -1 from the GPU memory left" in said


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
