"""LSE merge: shard algebra in float64, and Triton kernels against their references.

Only this file can tell a wrong merge formula from a wrong exchange: nothing is
communicated, the oracle is attention over all keys at once. Kernels run in Triton's
interpreter, in a worker (``--worker``), as it must be chosen before Triton is imported.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from helpers.merge_cases import (
    DTYPES,
    EMPTY_LSES,
    INF,
    NAN,
    ROUNDING,
    Case,
    assert_same,
    kernel_cases,
    kernel_inputs,
    work,
)
from sglang_dcp import ops
from sglang_dcp.ops import lse_merge, lse_merge_torch

LN2 = 0.6931471805599453


CASES = kernel_cases(("combine", "correct", "merge_two"))


def attention_and_shards(shards: int, base_e: bool, seed: int) -> tuple[Tensor, ...]:
    """Float64 attention (out, lse) and its random ragged split (outs, lses)."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(48, 3, 16, generator=gen, dtype=torch.float64) for _ in range(3)
    )
    scores = torch.einsum("thd,shd->ths", q[:4], k)
    owner = torch.randint(0, shards, (4, 48), generator=gen)
    # Token 0 leaves half of the shards without a key.
    owner[0] = owner[0] % max(1, shards // 2)
    outs, lses = [], []
    for shard in range(shards):
        own = scores.masked_fill((owner != shard).unsqueeze(1), -INF)
        # The softmax over no keys is NaN: this is the poison of an empty shard.
        outs.append(torch.einsum("ths,shd->thd", own.softmax(-1), v))
        lses.append(own.logsumexp(-1))
    out = torch.einsum("ths,shd->thd", scores.softmax(-1), v)
    unit = 1.0 if base_e else LN2
    return out, scores.logsumexp(-1) / unit, torch.stack(outs), torch.stack(lses) / unit


@pytest.mark.parametrize("base_e", [True, False], ids=["base-e", "base-2"])
@pytest.mark.parametrize("shards", range(1, 9), ids=lambda n: f"N{n}")
def test_shards_merge_to_unsharded_attention(shards: int, base_e: bool) -> None:
    for seed in range(5):
        out, lse, outs, lses = attention_and_shards(shards, base_e, seed)
        got = lse_merge_torch.lse_weighted_combine_torch(
            outs, lses, is_lse_base_on_e=base_e
        )
        assert_same(got[0], out, 1e-10)
        assert_same(got[1], lse, 1e-10)
        scaled = torch.zeros_like(out)
        state = (torch.full_like(out, NAN), torch.full_like(lse, -INF))
        for rank in range(shards):
            state = lse_merge_torch.merge_two_states_torch(
                *state, outs[rank], lses[rank], is_lse_base_on_e=base_e
            )
            got = lse_merge_torch.correct_attn_out_torch(
                outs[rank], lses, rank, is_lse_base_on_e=base_e
            )
            assert_same(got[1], lse, 1e-10)
            scaled += got[0]
        assert_same(scaled, out, 1e-10)
        assert_same(state[0], out, 1e-10)
        assert_same(state[1], lse, 1e-10)


def test_cases_tell_a_naive_merge() -> None:
    """Without the empty mask or in the wrong base, the same data gives other results."""
    out, lse, outs, lses = attention_and_shards(4, True, seed=0)
    weights = (lses - lses.logsumexp(0)).exp().unsqueeze(-1)
    assert (outs * weights).sum(0).isnan().any()
    wrong = lse_merge_torch.lse_weighted_combine_torch(
        outs, lses, is_lse_base_on_e=False
    )
    assert (wrong[0] - out).abs().max() > 1e-3
    assert (wrong[1] - lse).abs().max() > 1e-3


@pytest.mark.parametrize("mark", EMPTY_LSES.values(), ids=EMPTY_LSES)
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan-out", "inf-out"])
def test_empty_shards_do_not_poison(mark: float, poison: float) -> None:
    outs, lses = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    outs[1], lses[1] = poison, mark
    wanted = lse_merge.lse_weighted_combine(outs[::2], lses[::2], return_lse=True)
    got = lse_merge.lse_weighted_combine(outs, lses, return_lse=True)
    assert_same(got[0], wanted[0])
    assert_same(got[1], wanted[1])
    assert lse_merge.correct_attn_out(outs[1], lses, 1)[0].count_nonzero() == 0
    outs[:], lses[:] = poison, mark
    for out, lse in (
        lse_merge.lse_weighted_combine(outs, lses, return_lse=True),
        lse_merge.merge_two_states(outs[0], lses[0], outs[1], lses[1]),
    ):
        assert out.count_nonzero() == 0 and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_functions_agree(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # CPU users may have no Triton. Another test may have imported the kernels.
    kernels = "lse_merge_triton"
    monkeypatch.delattr(ops, kernels, raising=False)
    monkeypatch.setitem(sys.modules, f"{ops.__name__}.{kernels}", None)
    outs, lses = torch.randn(3, 4, 6, 33).to(DTYPES[dtype]), 5 * torch.randn(3, 4, 6)
    out, lse = lse_merge.lse_weighted_combine(outs, lses, return_lse=True)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32
    parts = [lse_merge.correct_attn_out(outs[rank], lses, rank)[0] for rank in range(3)]
    assert all(part.dtype == torch.float32 for part in parts)
    total = parts[0] + parts[1] + parts[2]
    assert_same(total.to(out.dtype), out, ROUNDING[dtype])
    state = lse_merge.merge_two_states(outs[0], lses[0], outs[1], lses[1])
    state = lse_merge.merge_two_states(*state, outs[2], lses[2])
    assert_same(state[0], out, 2 * ROUNDING[dtype])
    assert_same(state[1], lse, 1e-5)


def test_correct_accepts_views_and_a_destination() -> None:
    out, lses = torch.randn(4, 6, 8), torch.randn(3, 4, 6)
    wanted = lse_merge.correct_attn_out(out, lses, 1)
    for lses_view in (lses.unsqueeze(1), lses.unsqueeze(2), lses.unsqueeze(3)):
        got = lse_merge.correct_attn_out(out.unsqueeze(1), lses_view, 1)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    by_head = torch.full((6, 4, 8), NAN)
    strided = (out.mT.contiguous().mT, lses.mT.contiguous().mT)
    lse_merge.correct_attn_out(*strided, 1, corrected=by_head.transpose(0, 1))
    assert torch.equal(by_head.transpose(0, 1), wanted[0])
    one_token = lse_merge.correct_attn_out(out[:1, None], lses[:, :1, None], 1)
    assert_same(one_token[0], wanted[0][:1], 1e-6)


def test_one_shard_is_identity() -> None:
    out, lses = torch.randn(4, 6, 8), torch.randn(1, 4, 6)
    assert lse_merge.correct_attn_out(out, lses, 0)[0] is out
    got = lse_merge.lse_weighted_combine(out[None], lses)
    assert isinstance(got, Tensor)
    assert got.data_ptr() == out.data_ptr()


def test_wrong_arguments_are_refused() -> None:
    outs, lses = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match="lses"):
        lse_merge.lse_weighted_combine(outs, lses[:, :3])
    with pytest.raises(TypeError, match="float64"):
        lse_merge.lse_weighted_combine(outs.double(), lses)
    with pytest.raises(NotImplementedError, match="meta"):
        lse_merge.lse_weighted_combine(outs.to("meta"), lses.to("meta"))
    with pytest.raises(ValueError, match="rank 2"):
        lse_merge.correct_attn_out(outs[0], lses, 2)
    with pytest.raises(ValueError, match="corrected and out"):
        lse_merge.correct_attn_out(outs[0], lses, 1, corrected=outs[0, :3])
    with pytest.raises(TypeError, match="one dtype"):
        lse_merge.merge_two_states(outs[0], lses[0], outs[1].half(), lses[1])


@pytest.fixture(scope="module")
def kernel_results() -> dict[str, str]:
    return interpreter.results_of(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case: str, kernel_results: dict[str, str]) -> None:
    assert kernel_results[case] == ""


def run_kernel(name: str, case: Case) -> None:
    from sglang_dcp.ops import lse_merge_triton as kernels

    outs, lses = kernel_inputs(name, case)
    base_e = case.base == "e"
    out = torch.full(outs.shape[1:], NAN, dtype=outs.dtype)
    lse = torch.full(lses.shape[1:], NAN)
    if case.kernel == "combine":
        kernels.combine(outs, lses, out, lse, base_e)
        wanted = lse_merge_torch.lse_weighted_combine_torch(
            outs, lses, is_lse_base_on_e=base_e
        )
    elif case.kernel == "correct":
        out = torch.full(out.mT.shape, NAN).mT
        kernels.correct(outs[-1], lses, case.shards - 1, out, lse, base_e)
        wanted = lse_merge_torch.correct_attn_out_torch(
            outs[-1], lses, -1, is_lse_base_on_e=base_e
        )
    else:
        states = (outs[0], lses[0], outs[-1].contiguous(), lses[-1].contiguous())
        kernels.merge_two(*states, out, lse, base_e)
        wanted = lse_merge_torch.merge_two_states_torch(
            *states, is_lse_base_on_e=base_e
        )
    assert_same(out, wanted[0].to(out.dtype), ROUNDING[case.dtype])
    assert_same(lse, wanted[1], 1e-5)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(CASES, run_kernel)
    else:
        sys.exit(pytest.main([__file__]))
