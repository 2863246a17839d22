"""The MLA backends on a CPU, their kernels in torch, all ranks of a DCP group.

Only this file sees, without a GPU, pages, lengths, scales, log bases and head slices that
the backends hand to FlashInfer's and FA3's MLA kernels. It also sees that the kernels take
such arguments: stand-ins for FlashInfer 0.6 and 0.7, and the installed FlashInfer below its
own wrapper. The kernels themselves: `test_backends_mla_gpu.py`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import random
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.attention_oracle import Shape, decode, extend, mixed, move
from helpers.backend_groups import serve
from helpers.backend_ranks import FP8, Case
from helpers.mla_kernels_torch import (
    CompiledMla,
    Fa3Mla,
    FlashInferMha,
    FlashInferMla,
    FlashInferMlaContract,
    attend_pages,
    installed_wrapper,
)
from sglang_dcp.layers.backends import flashinfer_mla, flashinfer_plan
from sglang_dcp.layers.backends.base import Partial
from sglang_dcp.layers.backends.fa3_mla import Fa3MlaBackend
from sglang_dcp.layers.backends.flashinfer_mla import FlashInferMlaBackend
from sglang_dcp.layers.backends.flashinfer_plan import (
    ContractWrapper,
    LatentWrapper,
    Sizes,
    check_decode_rows,
    check_int32_strides,
    heads_at_once,
    latent_wrapper,
    plan_pages,
    plan_rows,
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
# Sizes that FlashInfer 0.7 takes, in fp8 DeepSeek's alone.
WIDE = Shape(8, 1, 192, 128, latent=True)
DEEPSEEK = Shape(8, 1, 576, 512, latent=True)
INSTALLED_CASES = {
    "page16": replace(BASE, shape=WIDE, page_size=16),
    "heads128": replace(BASE, shape=WIDE._replace(q_heads=128)),
    "fp8": replace(FP8_CASE, shape=DEEPSEEK, page_size=4),
}


def fa3(case: Case, runner: Any) -> Any:
    return Fa3MlaBackend(Fa3Mla(runner))


def flashinfer_0_6(case: Case, runner: Any) -> Any:
    wrappers = [FlashInferMla() for _ in range(3)]
    return FlashInferMlaBackend(runner, wrappers, FlashInferMha)


def flashinfer_0_7(case: Case, runner: Any) -> Any:
    wrappers = [FlashInferMlaContract() for _ in range(3)]
    return FlashInferMlaBackend(runner, wrappers, FlashInferMha)


FLASHINFERS = [flashinfer_0_6, flashinfer_0_7]
each_flashinfer = pytest.mark.parametrize(
    "make", FLASHINFERS, ids=lambda make: make.__name__
)


def plans_of(wrapper: Any) -> list[dict[str, Any]]:
    return wrapper._wrapper.plans


@pytest.fixture(autouse=True)
def no_event(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FlashInfer's plans wait for an event; here it notes the order."""
    noted: list[str] = []
    event = SimpleNamespace(
        synchronize=lambda: noted.append("wait"), record=lambda: noted.append("record")
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return noted


@pytest.fixture
def metadata_0_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our code imports of FlashInfer 0.7, whichever is installed."""
    module = ModuleType("flashinfer.mla")
    metadata = SimpleNamespace(csr=SimpleNamespace)
    module.MLAPlanMetadata = metadata  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("metadata_0_7")
@pytest.mark.parametrize("make", [fa3, flashinfer_0_7], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str, make: Any) -> None:
    serve(CASES[name], STEPS, REPLAYS, make, speculates=True)


@pytest.mark.parametrize("name", INSTALLED_CASES)
def test_the_installed_flashinfer_is_called_as_it_wants(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own wrapper plans, looks at what it is given, and starts our kernels."""

    def make(case: Case, runner: Any) -> Any:
        wrappers = [installed_wrapper(CompiledMla(), monkeypatch) for _ in range(3)]
        return FlashInferMlaBackend(runner, wrappers, FlashInferMha)

    serve(INSTALLED_CASES[name], STEPS, REPLAYS, make)


@each_flashinfer
@pytest.mark.usefixtures("metadata_0_7")
def test_flashinfer_reads_fp8_latents_without_a_copy(make: Any) -> None:
    group = serve(FP8_CASE, STEPS, REPLAYS, make)
    for rank in group.ranks:
        backend: Any = rank.backend.backend
        wrappers = backend._decode, backend._prefix, backend._new_tokens
        stored = [plans_of(wrapper)[-1]["kv_data_type"] for wrapper in wrappers]
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


@each_flashinfer
@pytest.mark.usefixtures("metadata_0_7")
def test_captured_steps_read_one_page_table(make: Any) -> None:
    """A graph keeps the address that its plan had; eager steps before it do not."""
    group = serve(BASE, STEPS, REPLAYS, make)
    replays = 1 + sum(step.mode != "MOVE" for step in REPLAYS)
    for rank in group.ranks:
        backend: Any = rank.backend.backend
        plans = plans_of(backend._decode)
        addresses = [plan["kv_indices"].data_ptr() for plan in plans[-replays:]]
        assert len(set(addresses)) == 1


def test_plans_are_sized_by_the_local_shard() -> None:
    """Of 66 + 20 positions of the longest request, each of two ranks lists 43."""
    group = serve(BASE, STEPS[:2], [], flashinfer_0_6)
    for rank in group.ranks:
        backend: Any = rank.backend.backend
        plan = plans_of(backend._prefix)[-1]
        assert len(plan["kv_indices"]) == len(plan["kv_len_arr"]) * 33


def test_each_plan_waits_for_the_one_before(no_event: list[str]) -> None:
    serve(replace(BASE, dcp_size=2), STEPS[:1], [], flashinfer_0_6)
    # Of each rank: the new tokens, planned by the first layer; at the end a decode step to
    # capture.
    assert no_event == ["wait", "record", "record"] * 2 + ["wait", "record"] * 2


@each_flashinfer
@pytest.mark.usefixtures("metadata_0_7")
def test_plans_too_large_go_a_few_heads_at_a_time(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flashinfer_plan, "_MAX_WORK", flashinfer_plan._SPLITS + 6)
    # A decode step never goes in parts.
    monkeypatch.setattr(flashinfer_mla, "check_decode_rows", lambda rows, heads: None)
    group = serve(BASE, STEPS, REPLAYS, make)
    backend: Any = group.ranks[0].backend.backend
    used = {plan["num_heads"] for plan in plans_of(backend._prefix)}
    assert used < {8, 4, 2, 1} and min(used) < 8
    assert {plan["num_heads"] for plan in plans_of(backend._decode)} == {8}


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


def test_rows_of_a_decode_step_that_fit_into_one_plan() -> None:
    for heads, rows in itertools.product((1, 16, 64, 80, 128), (1, 4000, 8064, 8065)):
        fits = heads_at_once([1] * rows, heads) == heads
        with nullcontext() if fits else pytest.raises(RuntimeError, match=f"^{rows} "):
            check_decode_rows(rows, heads)


def test_our_count_of_work_covers_flashinfers_own() -> None:
    """FlashInfer 0.7 refuses plans by a count that has the splits in it."""
    common = pytest.importorskip("flashinfer.mla._batch_mla._backends._fa_common")
    rng = random.Random(1)
    for _ in range(300):
        heads, requests = rng.choice([1, 8, 12, 128]), rng.randint(1, 40)
        queries = [rng.choice([1, 5, 300]) for _ in range(requests)]
        lens = [n + rng.choice([0, 7, 9000]) for n in queries]
        # Of an H200, and of the largest GPU so far.
        for sms in (132, 160):
            for causal in (False, True):
                sizes = heads, sms, causal
                count = common._fa_plan_work_count(queries, lens, *sizes)
                assert count <= flashinfer_plan._work(queries, heads)


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
        serve(BASE, STEPS[:1], [], flashinfer_0_6)


def test_a_layer_that_scales_otherwise_than_the_plan() -> None:
    def make(case: Case, runner: Any) -> Any:
        runner.model_config.scaling *= 2
        return flashinfer_0_6(case, runner)

    with pytest.raises(RuntimeError, match="layer 0 scales by"):
        serve(BASE, STEPS[:1], [], make)


def arguments(path: str, name: str) -> list[str]:
    """Of function `name`, the longest so called, in a file of site-packages."""
    # Read but not imported: that takes a GPU for FA3.
    tree = ast.walk(ast.parse((site_packages() / path).read_text()))
    found = [n for n in tree if isinstance(n, ast.FunctionDef) and n.name == name]
    sizes = [[arg.arg for arg in n.args.args + n.args.kwonlyargs] for n in found]
    return [arg for arg in max(sizes, key=len) if arg != "self"]


def site_packages() -> Path:
    return Path(inspect.getfile(torch)).parents[1]


FA3, FLASHINFER_0_7 = (
    "sgl_kernel/flash_attn.py",
    "flashinfer/mla/_batch_mla/_wrapper.py",
)
HAS_0_7 = (site_packages() / FLASHINFER_0_7).exists()
FLASHINFER = FLASHINFER_0_7 if HAS_0_7 else "flashinfer/mla/_core.py"
STAND_IN: Any = FlashInferMlaContract if HAS_0_7 else FlashInferMla


@pytest.mark.parametrize(
    ("ours", "path"),
    [
        (Fa3Mla.flash_attn_varlen_func, FA3),
        (Fa3Mla.flash_attn_with_kvcache, FA3),
        (STAND_IN.plan, FLASHINFER),
        (STAND_IN.run, FLASHINFER),
    ],
)
def test_stand_ins_take_what_the_kernels_take(ours: Any, path: str) -> None:
    taken = set(inspect.signature(ours).parameters) - {"self"}
    assert taken <= set(arguments(path, ours.__name__))


SIZES = Sizes(
    *(8, 512, 64, 0.5),
    *(torch.bfloat16, torch.bfloat16),
    page_size=4,
    device=torch.device("cpu"),
)


def test_wrappers_are_told_apart_by_what_they_take() -> None:
    assert type(latent_wrapper(FlashInferMla())) is LatentWrapper
    assert type(latent_wrapper(FlashInferMlaContract())) is ContractWrapper


@pytest.mark.usefixtures("metadata_0_7")
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
def test_one_contract_holds_for_all_plans(kv_dtype: torch.dtype) -> None:
    stand_in = FlashInferMlaContract()
    wrapper, sizes = latent_wrapper(stand_in), SIZES._replace(kv_dtype=kv_dtype)
    pages, lens = torch.zeros(3, 5, dtype=torch.int32), torch.tensor([9, 0, 20])
    plan_pages(wrapper, sizes, 8, [1, 1, 1], lens, pages)
    plan_pages(wrapper, sizes, 4, [1, 1], lens[:2], pages)
    [contract] = stand_in.contracts
    assert contract["lse_mode"] == "base2"
    assert (contract["page_size"], contract["kv_data_type"]) == (4, kv_dtype)
    assert [plan["num_heads"] for plan in stand_in.plans] == [8, 4]
    assert [plan["kv_indptr"].tolist() for plan in stand_in.plans] == [
        [0, 5, 10, 15],
        [0, 5, 10],
    ]


def random_rows(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_captured_step_reads_the_plan_made_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the installed FlashInfer: what was handed to its kernel stays as it is."""
    compiled = CompiledMla()
    wrapper = latent_wrapper(installed_wrapper(compiled, monkeypatch))
    rows, latents = random_rows(3, 8, 576), random_rows(64, 4, 576)
    q, keys = rows.split([512, 64], -1), latents.split([512, 64], -1)
    graph_pages = torch.zeros(4, 16, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)

    def plan(lens: list[int], pages: torch.Tensor) -> None:
        pages.copy_(torch.randint(1, 64, pages.shape, generator=generator))
        queries = [1] * len(lens)
        plan_pages(wrapper, SIZES, 8, queries, torch.tensor(lens), pages)

    plan([5, 64, 1], graph_pages)
    out, lse = wrapper.run(q, keys)
    [captured] = compiled.runs
    # An eager step, of another size and other pages, does not move anything.
    plan([8, 1, 2, 3, 4], torch.zeros(5, 3, dtype=torch.int32))
    for lens in ([30, 4, 17], [1, 1, 64]):
        plan(lens, graph_pages)
        compiled.run(*captured)
        flat, how = graph_pages.view(-1), (SIZES.scaling, False)
        ends, firsts = [0, 1, 2, 3], [0, 16, 32]
        wanted = attend_pages(q, keys, ends, firsts, lens, flat, how)
        assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def test_the_installed_flashinfer_warns_of_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapper = latent_wrapper(installed_wrapper(CompiledMla(), monkeypatch))
    rows = random_rows(7, 8, 576)
    parts = rows.split([512, 64], -1)
    keys = rows[:, :1].split([512, 64], -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_rows(wrapper, SIZES, 8, [3, 4])
        wrapper.run(parts, keys)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
