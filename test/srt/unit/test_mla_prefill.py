"""DeepSeek's prefill by MHA on a CPU, kernels in torch, all ranks of a DCP group.

Only this file sees, without a GPU, SGLang's own code of such a prefill over our pools.
Latents are written to local slots and gathered, in one shot or in prefix chunks. Prefix
chunks are merged by the LSE that backends return.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import mla_expanded
from helpers.attention_oracle import extend, mixed, move
from helpers.backend_ranks import FP8, Case
from helpers.mla_expanded import Prefill, Sizes, cases_of, serve
from helpers.mla_kernels_torch import Fa3Mla, FlashInferMha, FlashInferMla
from sglang_dcp.layers.backends.fa3_mla import Fa3MlaBackend
from sglang_dcp.layers.backends.flashinfer_mla import FlashInferMlaBackend
from sglang_dcp.layers.mla import dispatch
from sglang_dcp.layers.mla.form import PrefillForm, expanded_form
from sglang_dcp.ops.lse_merge import merge_two_states
from sglang_dcp.releases.installed import in_range, sglang_version

STEPS = [
    extend(a=1, b=7, c=30, d=66),
    mixed(a=5, d=20, b=1, e=40, c=9),
    mixed(f=1),
    mixed(f=1, a=1),
    move("cd"),
    mixed(d=3, c=2),
]
BASE = Prefill("fa3", Sizes(8, 64, 16, 24, 20), device="cpu", max_len=120)
CASES = {
    # 104 positions of prefix in chunks of 25, cut amid d's 66.
    **cases_of(BASE, capacity=25),
    "dcp3": replace(BASE, sizes=BASE.sizes._replace(heads=12), dcp_size=3),
    "fp16": replace(BASE, dtype=torch.float16),
}


def fa3(case: Case, runner: Any) -> Any:
    return Fa3MlaBackend(Fa3Mla(runner))


def flashinfer(case: Case, runner: Any) -> Any:
    wrappers = [FlashInferMla() for _ in range(3)]
    return FlashInferMlaBackend(runner, wrappers, FlashInferMha)


def merge_state_v2(*args: Tensor) -> None:
    """SGLang's kernel, natural logarithm: (out, lse) twice, then where they go."""
    a, lse_a, b, lse_b, out, lse = args
    assert lse_a.dtype == lse_b.dtype == torch.float32
    assert lse_a.is_contiguous() and lse_a.shape == a.shape[:2] == lse_b.shape
    # As the kernel, which knows no key by -inf and lets every NaN through.
    assert a.isfinite().all() and b.isfinite().all()
    assert not lse_a.isnan().any() and not lse_b.isnan().any()
    merged = merge_two_states(a, lse_a, b, lse_b, is_lse_base_on_e=True)
    out.copy_(merged[0])
    lse.copy_(merged[1])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang's code takes from CUDA."""
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    if in_range(sglang_version(), None, "0.5.23"):
        monkeypatch.setattr(
            forward_mha, "merge_state_v2", merge_state_v2, raising=False
        )
        return
    from sglang.srt.layers.attention import merge_state

    monkeypatch.setattr(merge_state, "merge_state_triton", merge_state_v2)


@pytest.mark.parametrize("make", [fa3, flashinfer], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str, make: Any) -> None:
    serve(CASES[name], STEPS, make)


@pytest.mark.parametrize("capacity", [25, 1 << 17])
def test_fp8_latents_are_gathered_as_they_are(capacity: int) -> None:
    serve(replace(BASE, kv_dtype=FP8, capacity=capacity), STEPS, flashinfer)


def test_each_prefix_chunk_has_a_plan_beside_that_of_new_tokens() -> None:
    """10 and 3 positions in chunks of 8, then 5 in one shot; all twice, by two passes."""
    steps = [extend(a=3, b=10), mixed(b=2, a=1), mixed(a=1)]
    group = serve(replace(BASE, capacity=8), steps, flashinfer)
    for rank in group.ranks:
        wrappers: Any = rank.backend.backend._mha  # type: ignore[attr-defined]
        assert {None: 6, 0: 2, 1: 2} == {
            number: len(wrapper.plans) for number, wrapper in wrappers.items()
        }
        keys = [wrappers[i].plans[0]["kv_indptr"].diff().tolist() for i in range(2)]
        assert keys == [[8, 0], [2, 3]]
        new = [plan["kv_indptr"].diff().tolist() for plan in wrappers[None].plans]
        assert new == [[3, 10]] * 2 + [[2, 1]] * 2 + [[5]] * 2


@pytest.mark.parametrize("capacity, chunks", [(14, 0), (13, 1), (7, 2)])
def test_chunks_where_prefix_and_new_tokens_are_more_than_the_capacity(
    capacity: int, chunks: int
) -> None:
    """10 and 1 positions of prefix, 2 and 1 new ones."""
    with mla_expanded.surroundings(replace(BASE, capacity=capacity)):
        group = mla_expanded.Group(replace(BASE, capacity=capacity), fa3)
        batch: Any = mla_expanded.batch_kind()(
            extend_prefix_lens_cpu=[10, 1],
            extend_seq_lens_cpu=[2, 1],
            req_pool_indices=torch.arange(2),
        )
        prefill = group.ranks[0].backend.prefill
        # Each layer asks.
        for _ in range(2):
            form = expanded_form(dispatch.prefill_batch(batch))
            assert (form is PrefillForm.ONE_SHOT) == (not chunks)
            prefill.prepare(batch, form)
        assert batch.num_prefix_chunks == (chunks or None)


@pytest.mark.parametrize("capacity", [1 << 17, 16])
@pytest.mark.parametrize("plans", ["_plans", "_keys"])
def test_plans_of_the_forward_before_are_seen_as_wrong(
    plans: str, capacity: int
) -> None:
    """The harness is no mirror."""

    class Forgetful(dict):  # type: ignore[type-arg]
        def clear(self) -> None:
            pass

    prefill = replace(BASE, capacity=capacity)

    def run(kind: type) -> None:
        with mla_expanded.surroundings(prefill):
            group = mla_expanded.Group(prefill, fa3)
            for rank in group.ranks:
                setattr(rank.backend.prefill, plans, kind())
            for step in (extend(a=30), mixed(a=5), mixed(a=5)):
                group.run(step)

    run(dict)
    with pytest.raises((AssertionError, RuntimeError)):
        run(Forgetful)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
