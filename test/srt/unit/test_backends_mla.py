"""The MLA backends on a CPU, their kernels in torch, all ranks of a DCP group.

Only this file sees, without a GPU, pages, lengths, scales, log bases and head slices that
the backends hand to FlashInfer's and FA3's MLA kernels, and that these take such
arguments at all. The kernels themselves: `test_backends_mla_gpu.py`.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.attention_oracle import Shape, decode, extend, mixed, move
from helpers.backend_groups import serve
from helpers.backend_ranks import FP8, Case
from helpers.mla_kernels_torch import Fa3Mla, FlashInferMha, FlashInferMla
from sglang_dcp.layers.backends import flashinfer_plan
from sglang_dcp.layers.backends.base import Partial
from sglang_dcp.layers.backends.fa3_mla import Fa3MlaBackend
from sglang_dcp.layers.backends.flashinfer_mla import FlashInferMlaBackend
from sglang_dcp.layers.backends.flashinfer_plan import (
    check_int32_strides,
    heads_at_once,
)

STEPS = [
    extend(a=1, b=7, c=30, d=66),
    mixed(a=5, d=20, b=1, e=40, c=9),
    mixed(f=1),
    decode("abcdef"),
    decode("f"),
    mixed(f=1, a=1),
    move("cd"),
    decode("fdcb"),
]
REPLAYS = [decode("dcfa"), decode("fa"), move("a"), decode("adf")]


def latent(heads: int) -> Shape:
    return Shape(heads, 1, 80, 64, latent=True)


BASE = Case("fa3", latent(8), device="cpu", max_len=120)
CASES = {
    "dcp2": BASE,
    "dcp2-page16": replace(BASE, page_size=16),
    "dcp3": replace(BASE, shape=latent(12), dcp_size=3, page_size=4),
    "dcp4": replace(BASE, dcp_size=4),
    "dcp8-page64": replace(BASE, shape=latent(16), dcp_size=8, page_size=64),
    "heads128": replace(BASE, shape=latent(128), page_size=16),
    "fp16": replace(BASE, dtype=torch.float16),
    "idle-scale": replace(BASE, idle_scale=0.5),
}
FP8_CASE = replace(BASE, kv_dtype=FP8)


def fa3(case: Case, runner: Any) -> Any:
    return Fa3MlaBackend(Fa3Mla(runner))


def flashinfer(case: Case, runner: Any) -> Any:
    wrappers = [FlashInferMla() for _ in range(3)]
    return FlashInferMlaBackend(runner, wrappers, FlashInferMha)


@pytest.fixture(autouse=True)
def no_event(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FlashInfer's plans wait for an event; here it notes the order."""
    noted: list[str] = []
    event = SimpleNamespace(
        synchronize=lambda: noted.append("wait"), record=lambda: noted.append("record")
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return noted


@pytest.mark.parametrize("make", [fa3, flashinfer], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str, make: Any) -> None:
    serve(CASES[name], STEPS, REPLAYS, make)


def test_flashinfer_reads_fp8_latents_without_a_copy() -> None:
    group = serve(FP8_CASE, STEPS, REPLAYS, flashinfer)
    for rank in group.ranks:
        backend: Any = rank.backend.backend
        wrappers = backend._decode, backend._prefix, backend._new_tokens
        stored = [wrapper.plans[-1]["kv_data_type"] for wrapper in wrappers]
        assert stored == [FP8, FP8, torch.bfloat16]


def test_new_tokens_absorbed_are_rounded_as_fp8_stores_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As plain SGLang reads them from its pool."""
    seen: list[torch.Tensor] = []

    def run(backend: Any, wrapper: Any, q: Any, keys: Any, *more: Any) -> Partial:
        seen.append(keys)
        return Partial(*q)

    monkeypatch.setattr(FlashInferMlaBackend, "_run", run)
    k = torch.linspace(-2, 2, 160).view(2, 1, 80).bfloat16()
    rounded = k.to(FP8).bfloat16()
    assert not torch.equal(rounded, k)
    for case, wanted in ((FP8_CASE, rounded), (BASE, k)):
        pool = SimpleNamespace(dtype=case.kv_dtype or case.dtype)
        backend: Any = object.__new__(FlashInferMlaBackend)
        backend._pool, backend._new_heads, backend._new_tokens = pool, 1, None
        layer: Any = SimpleNamespace(v_head_dim=64)
        backend.extend_new_tokens(k, k, k, layer, None)
        assert torch.equal(seen.pop(), wanted)


def test_captured_steps_read_one_page_table() -> None:
    """A graph keeps the address that its plan had; eager steps before it do not."""
    group = serve(BASE, STEPS, REPLAYS, flashinfer)
    replays = 1 + sum(step.mode != "MOVE" for step in REPLAYS)
    for rank in group.ranks:
        plans = rank.backend.backend._decode.plans  # type: ignore[attr-defined]
        addresses = [plan["kv_indices"].data_ptr() for plan in plans[-replays:]]
        assert len(set(addresses)) == 1


def test_plans_are_sized_by_the_local_shard() -> None:
    """Of 66 + 20 positions of the longest request, each of two ranks lists 43."""
    group = serve(BASE, STEPS[:2], [], flashinfer)
    for rank in group.ranks:
        plan = rank.backend.backend._prefix.plans[-1]  # type: ignore[attr-defined]
        assert len(plan["kv_indices"]) == len(plan["kv_len_arr"]) * 33


def test_each_plan_waits_for_the_one_before(no_event: list[str]) -> None:
    serve(replace(BASE, dcp_size=2), STEPS[:1], [], flashinfer)
    # Of each rank: the new tokens, planned by the first layer; at the end a decode step to
    # capture.
    assert no_event == ["wait", "record", "record"] * 2 + ["wait", "record"] * 2


def test_plans_too_large_go_a_few_heads_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flashinfer_plan, "_MAX_WORK", flashinfer_plan._SPLITS + 6)
    group = serve(BASE, STEPS, REPLAYS, flashinfer)
    backend: Any = group.ranks[0].backend.backend
    used = {plan["num_heads"] for plan in backend._prefix.plans}
    assert used < {8, 4, 2, 1} and min(used) < 8
    assert {plan["num_heads"] for plan in backend._decode.plans} == {8}


@pytest.mark.parametrize(
    ("queries", "heads", "at_once"),
    [
        ([8192], 16, 16),
        # 8192 tiles of 128 rows, and twice as many.
        ([8192], 128, 128),
        ([16384], 128, 64),
        ([1] * 64, 8, 8),
        ([131072], 12, 12),
        ([262144], 12, 6),
    ],
)
def test_heads_at_once(queries: list[int], heads: int, at_once: int) -> None:
    assert heads_at_once(queries, heads) == at_once


def test_tokens_that_fit_into_no_plan() -> None:
    with pytest.raises(ValueError, match="3000000 tokens"):
        heads_at_once([3_000_000], 8)


def test_queries_beyond_32_bits() -> None:
    """Of 128 heads of 576 numbers: 58254 tokens, in whatever order they lie."""

    def layouts(tokens: int) -> list[torch.Tensor]:
        rows = torch.empty(tokens, 128, 576, device="meta")
        return [rows, rows[..., :512], rows.view(128, tokens, 576).transpose(0, 1)]

    for queries in layouts(58254):
        check_int32_strides(queries)
    for queries in layouts(58255):
        with pytest.raises(RuntimeError, match="use a smaller --chunked-prefill-size"):
            check_int32_strides(queries)


def test_each_run_looks_at_the_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_plan, "_MAX_OFFSET", 100)
    with pytest.raises(RuntimeError, match="--chunked-prefill-size"):
        serve(BASE, STEPS[:1], [], flashinfer)


def test_a_layer_that_scales_otherwise_than_the_plan() -> None:
    def make(case: Case, runner: Any) -> Any:
        runner.model_config.scaling *= 2
        return flashinfer(case, runner)

    with pytest.raises(RuntimeError, match="layer 0 scales by"):
        serve(BASE, STEPS[:1], [], make)


def arguments(path: str, name: str) -> list[str]:
    """Of function `name`, the longest so called, in a file of site-packages."""
    root = Path(inspect.getfile(torch)).parents[1]
    # Read but not imported: that takes a GPU.
    tree = ast.walk(ast.parse((root / path).read_text()))
    found = [n for n in tree if isinstance(n, ast.FunctionDef) and n.name == name]
    sizes = [[arg.arg for arg in n.args.args + n.args.kwonlyargs] for n in found]
    return [arg for arg in max(sizes, key=len) if arg != "self"]


FA3, FLASHINFER = "sgl_kernel/flash_attn.py", "flashinfer/mla/_core.py"


@pytest.mark.parametrize(
    ("ours", "path"),
    [
        (Fa3Mla.flash_attn_varlen_func, FA3),
        (Fa3Mla.flash_attn_with_kvcache, FA3),
        (FlashInferMla.run, FLASHINFER),
    ],
)
def test_stand_ins_take_what_the_kernels_take(ours: Any, path: str) -> None:
    taken = set(inspect.signature(ours).parameters) - {"self"}
    assert taken <= set(arguments(path, ours.__name__))


def test_plans_name_their_sizes_in_the_order_of_flashinfer() -> None:
    known = arguments(FLASHINFER, "plan")
    assert known[: len(FlashInferMla.PLAN)] == FlashInferMla.PLAN


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
