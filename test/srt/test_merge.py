"""LSE merge: shard algebra in float64, and Triton kernels against their references.

Only this file can tell a wrong merge formula from a wrong exchange: nothing is
communicated, the oracle is attention over all keys at once. Kernels run in Triton's
interpreter, in a worker (``--worker``), as it must be chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sglang_dcp.layers import merge, merge_ref

LN2 = 0.6931471805599453
NAN, INF = float("nan"), float("inf")
EMPTY_LSES = {"minus-inf": -INF, "nan": NAN, "plus-inf": INF}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Both sides compute in fp32: what may differ is one rounding to the payload's dtype.
ROUNDING = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 3e-6}


class Case(NamedTuple):
    kernel: str
    shards: int
    tokens: int
    own_heads: int
    head_dim: int
    dtype: str
    layout: str
    base: str


def kernel_cases(kernels: Iterable[str]) -> dict[str, Case]:
    cases = []
    for kernel in kernels:
        for i, (dim, n) in enumerate({64: 3, 96: 2, 128: 5, 512: 1, 33: 7}.items()):
            for j, dtype in enumerate(DTYPES):
                layout = "strided" if (i + j) % 2 else "dense"
                cases.append(Case(kernel, n, 2, 1, dim, dtype, layout, "2e"[i % 2]))
        cases.append(Case(kernel, 2, 3, 3, 64, "bf16", "strided", "2"))
        cases.append(Case(kernel, 3, 0, 1, 64, "bf16", "dense", "e"))
    return {"{}-N{}-T{}-h{}-D{}-{}-{}-{}".format(*case): case for case in cases}


CASES = kernel_cases(("combine", "correct", "merge_two"))


def attention_and_shards(shards: int, base_e: bool, seed: int) -> tuple[Tensor, ...]:
    """Float64 attention (out, lse) and its random ragged split (outs, lses)."""
    gen = torch.Generator().manual_seed(seed)
    shape = {"size": (48, 3, 16), "generator": gen, "dtype": torch.float64}
    q, k, v = torch.randn(**shape)[:4], torch.randn(**shape), torch.randn(**shape)
    scores = torch.einsum("thd,shd->ths", q, k)
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


def assert_same(actual: Tensor, wanted: Tensor, tol: float = 0.0) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tol, atol=tol)


@pytest.mark.parametrize("base_e", [True, False], ids=["base-e", "base-2"])
@pytest.mark.parametrize("shards", range(1, 9), ids=lambda n: f"N{n}")
def test_shards_merge_to_unsharded_attention(shards: int, base_e: bool) -> None:
    base = {"is_lse_base_on_e": base_e}
    for seed in range(5):
        out, lse, outs, lses = attention_and_shards(shards, base_e, seed)
        got = merge_ref.lse_weighted_combine_ref(outs, lses, **base)
        assert_same(got[0], out, 1e-10)
        assert_same(got[1], lse, 1e-10)
        scaled = torch.zeros_like(out)
        state = (torch.full_like(out, NAN), torch.full_like(lse, -INF))
        for rank in range(shards):
            own = (outs[rank], lses[rank])
            state = merge_ref.merge_two_states_ref(*state, *own, **base)
            got = merge_ref.correct_attn_out_ref(outs[rank], lses, rank, **base)
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
    wrong = merge_ref.lse_weighted_combine_ref(outs, lses, is_lse_base_on_e=False)
    assert (wrong[0] - out).abs().max() > 1e-3
    assert (wrong[1] - lse).abs().max() > 1e-3


@pytest.mark.parametrize("mark", EMPTY_LSES.values(), ids=EMPTY_LSES)
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan-out", "inf-out"])
def test_empty_shards_do_not_poison(mark: float, poison: float) -> None:
    outs, lses = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 4)
    outs[1], lses[1] = poison, mark
    wanted = merge.lse_weighted_combine(outs[::2], lses[::2], return_lse=True)
    got = merge.lse_weighted_combine(outs, lses, return_lse=True)
    assert_same(got[0], wanted[0])
    assert_same(got[1], wanted[1])
    assert merge.correct_attn_out(outs[1], lses, 1)[0].count_nonzero() == 0
    outs[:], lses[:] = poison, mark
    for out, lse in (
        merge.lse_weighted_combine(outs, lses, return_lse=True),
        merge.merge_two_states(outs[0], lses[0], outs[1], lses[1]),
    ):
        assert out.count_nonzero() == 0 and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_public_functions_agree(dtype: str) -> None:
    outs, lses = torch.randn(3, 4, 6, 33).to(DTYPES[dtype]), 5 * torch.randn(3, 4, 6)
    out, lse = merge.lse_weighted_combine(outs, lses, return_lse=True)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32
    parts = [merge.correct_attn_out(outs[rank], lses, rank)[0] for rank in range(3)]
    assert all(part.dtype == torch.float32 for part in parts)
    assert_same(sum(parts).to(out.dtype), out, ROUNDING[dtype])
    state = merge.merge_two_states(outs[0], lses[0], outs[1], lses[1])
    state = merge.merge_two_states(*state, outs[2], lses[2])
    assert_same(state[0], out, 2 * ROUNDING[dtype])
    assert_same(state[1], lse, 1e-5)
    assert "sglang_dcp.layers.merge_triton" not in sys.modules


def test_correct_accepts_views_and_a_destination() -> None:
    out, lses = torch.randn(4, 6, 8), torch.randn(3, 4, 6)
    wanted = merge.correct_attn_out(out, lses, 1)
    for lses_view in (lses.unsqueeze(1), lses.unsqueeze(2), lses.unsqueeze(3)):
        got = merge.correct_attn_out(out.unsqueeze(1), lses_view, 1)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    by_head = torch.full((6, 4, 8), NAN)
    strided = (out.mT.contiguous().mT, lses.mT.contiguous().mT)
    merge.correct_attn_out(*strided, 1, corrected=by_head.transpose(0, 1))
    assert torch.equal(by_head.transpose(0, 1), wanted[0])
    one_token = merge.correct_attn_out(out[:1, None], lses[:, :1, None], 1)
    assert_same(one_token[0], wanted[0][:1], 1e-6)


def test_one_shard_is_identity() -> None:
    out, lses = torch.randn(4, 6, 8), torch.randn(1, 4, 6)
    assert merge.correct_attn_out(out, lses, 0)[0] is out
    got = merge.lse_weighted_combine(out[None], lses)
    assert got.data_ptr() == out.data_ptr()


def test_wrong_arguments_are_refused() -> None:
    outs, lses = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6)
    with pytest.raises(ValueError, match="lses"):
        merge.lse_weighted_combine(outs, lses[:, :3])
    with pytest.raises(TypeError, match="float64"):
        merge.lse_weighted_combine(outs.double(), lses)
    with pytest.raises(NotImplementedError, match="meta"):
        merge.lse_weighted_combine(outs.to("meta"), lses.to("meta"))
    with pytest.raises(ValueError, match="rank 2"):
        merge.correct_attn_out(outs[0], lses, 2)
    with pytest.raises(ValueError, match="corrected and out"):
        merge.correct_attn_out(outs[0], lses, 1, corrected=outs[0, :3])
    with pytest.raises(TypeError, match="one dtype"):
        merge.merge_two_states(outs[0], lses[0], outs[1].half(), lses[1])


def interpreted(file: str) -> dict[str, str]:
    """What `work` prints in `file`'s worker, where Triton interprets its kernels."""
    pytest.importorskip("triton", reason="needs triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", file, "--worker"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernel_results() -> dict[str, str]:
    return interpreted(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case: str, kernel_results: dict[str, str]) -> None:
    assert kernel_results[case] == ""


def kernel_inputs(name: str, case: Case) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = (case.shards, case.tokens, case.shards * case.own_heads)
    outs = torch.randn(*shape, case.head_dim, generator=gen).to(DTYPES[case.dtype])
    lses = 5 * torch.randn(*shape, generator=gen)
    choice = torch.randint(0, 6, shape, generator=gen)
    for i, mark in enumerate(EMPTY_LSES.values()):
        lses[choice == i] = mark
    lses[:, :1, 0] = -INF
    outs[~lses.isfinite()] = NAN
    if case.layout == "dense":
        return outs, lses
    gaps = torch.full((*shape, 2 * case.head_dim), NAN, dtype=outs.dtype)
    gaps[..., ::2] = outs
    return gaps[..., ::2], lses.mT.contiguous().mT


def run_kernel(name: str, case: Case) -> None:
    from sglang_dcp.layers import merge_triton as kernels

    outs, lses = kernel_inputs(name, case)
    base_e = case.base == "e"
    base = {"is_lse_base_on_e": base_e}
    out = torch.full(outs.shape[1:], NAN, dtype=outs.dtype)
    lse = torch.full(lses.shape[1:], NAN)
    if case.kernel == "combine":
        kernels.combine(outs, lses, out, lse, base_e)
        wanted = merge_ref.lse_weighted_combine_ref(outs, lses, **base)
    elif case.kernel == "correct":
        out = torch.full(out.mT.shape, NAN).mT
        kernels.correct(outs[-1], lses, case.shards - 1, out, lse, base_e)
        wanted = merge_ref.correct_attn_out_ref(outs[-1], lses, -1, **base)
    else:
        states = (outs[0], lses[0], outs[-1].contiguous(), lses[-1].contiguous())
        kernels.merge_two(*states, out, lse, base_e)
        wanted = merge_ref.merge_two_states_ref(*states, **base)
    assert_same(out, wanted[0].to(out.dtype), ROUNDING[case.dtype])
    assert_same(lse, wanted[1], 1e-5)


def work(cases: dict[str, Case], run: Callable[[str, Case], None]) -> None:
    """In a worker: print `{case name: fault or ""}`."""
    results = {}
    for name, case in cases.items():
        try:
            run(name, case)
            results[name] = ""
        except AssertionError as error:
            results[name] = str(error) or "bits differ"
    print(json.dumps(results))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.exit(work(CASES, run_kernel))
    sys.exit(pytest.main([__file__]))
