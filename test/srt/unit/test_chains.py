"""Chain attention: kernel = torch form = a float64 softmax over all keys of each token.

Triton's interpreter runs the kernel where there is no GPU. Only here do widths around a
tile, dims that fill no block, heads that start inside a K/V head and rows without a prefix
meet.
"""

from __future__ import annotations

import json
import math
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from sglang_dcp.ops.chains import Chains, ChainSizes, attend_chains
from sglang_dcp.ops.chains_torch import attend_chains_torch

PREFIX = 5
SCALING = 0.3


class Case(NamedTuple):
    """Sizes of a rank. A DCP group has `ranks` times the heads, and `rank` is looked at."""

    requests: int
    width: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    base_e: bool = True
    ranks: int = 2
    rank: int = 1
    rope: int = 0


CASES = {
    "one-kv-head": Case(3, 2, 4, 1, 128, 128, torch.bfloat16),
    "latent": Case(2, 4, 8, 1, 512, 512, torch.bfloat16, False, rope=64),
    "latent-whole": Case(2, 3, 4, 1, 80, 64, torch.float32),
    "own-heads-span-kv-heads": Case(2, 5, 6, 4, 64, 64, torch.float16),
    "uneven": Case(4, 3, 3, 2, 24, 16, torch.float32, ranks=2),
    "first-rank": Case(1, 7, 4, 2, 33, 17, torch.float32, False, rank=0),
    "more-than-a-tile": Case(2, 19, 2, 1, 64, 64, torch.bfloat16),
    "a-tile": Case(1, 16, 2, 2, 64, 64, torch.float32, ranks=3, rank=2),
    "one-token": Case(2, 1, 2, 1, 64, 64, torch.float32),
    "no-request": Case(0, 2, 2, 1, 64, 64, torch.bfloat16),
}


class Inputs(NamedTuple):
    chains: Chains
    prefix: Tensor
    prefix_lse: Tensor
    sizes: ChainSizes
    wanted: Tensor


def rows(case: Case, gen: torch.Generator, heads: int, dim: int) -> Tensor:
    """Rows with strides of their own, as slices of projections have them."""
    wide = torch.randn(case.requests * case.width, heads, dim + 3, generator=gen)
    return wide.to(case.dtype)[..., :dim]


def make(case: Case) -> Inputs:
    gen = torch.Generator().manual_seed(case.width)
    q, k = (
        rows(case, gen, heads, case.dim + case.rope)
        for heads in (case.heads, case.kv_heads)
    )
    v = rows(case, gen, case.kv_heads, case.v_dim)
    heads_of_kv = case.heads * case.ranks // case.kv_heads
    kv = (case.rank * case.heads + torch.arange(case.heads)) // heads_of_kv
    # Keys of the prefix: those of its last request are left out, as on no rank.
    keys = torch.randn(case.requests, PREFIX, case.heads, case.dim + case.rope)
    values = torch.randn(case.requests, PREFIX, case.heads, case.v_dim)
    tokens = case.requests * case.width
    prefix = torch.full((tokens, case.heads, case.v_dim), math.nan, dtype=case.dtype)
    lse = torch.full((tokens, case.heads), -math.inf)
    wanted = torch.zeros(tokens, case.heads, case.v_dim, dtype=torch.float64)
    for token in range(tokens):
        request, j = divmod(token, case.width)
        own = slice(request * case.width, token + 1)
        new = torch.einsum("hd,khd->hk", q[token].double(), k[own][:, kv].double())
        scores, seen = new * SCALING, v[own][:, kv].double()
        if request < case.requests - 1 or case.requests == 1:
            old = torch.einsum("hd,khd->hk", q[token].double(), keys[request].double())
            old = old * SCALING
            known = old.softmax(-1)
            prefix[token] = torch.einsum(
                "hk,khd->hd", known, values[request].double()
            ).to(case.dtype)
            lse[token] = old.logsumexp(-1) / (1 if case.base_e else math.log(2))
            # As it is rounded, so that only the merge is looked at.
            scores = torch.cat([scores, old.logsumexp(-1, keepdim=True)], -1)
            seen = torch.cat([seen, prefix[token].double()[None]])
        wanted[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), seen)
    if case.rope:
        (q, q_rope), (k, k_rope) = (
            part.split([case.dim, case.rope], dim=-1) for part in (q, k)
        )
        chains = Chains(q, k, v, q_rope, k_rope)
    else:
        chains = Chains(q, k, v)
    sizes = ChainSizes(
        width=case.width,
        scaling=SCALING,
        first_head=case.rank * case.heads,
        heads_of_kv=heads_of_kv,
        is_lse_base_on_e=case.base_e,
    )
    return Inputs(chains, prefix, lse, sizes, wanted)


def distance(case: Case, found: Tensor, wanted: Tensor) -> float:
    """Return how far `found` is, as a part of what its dtype can tell apart."""
    assert found.shape == wanted.shape and found.dtype == case.dtype
    if not found.numel():
        return 0.0
    gap = (found.cpu().double() - wanted).abs().max().item()
    # A NaN is far, whatever it is compared with.
    return gap / torch.finfo(found.dtype).eps if math.isfinite(gap) else 1e9


def kernel_distance(name: str, device: str) -> float:
    case = CASES[name]
    inputs = make(case)
    moved = [None if part is None else part.to(device) for part in inputs.chains]
    prefix, lse = inputs.prefix.to(device), inputs.prefix_lse.to(device)
    if device == "cpu":
        # The dispatch takes the torch form there.
        from sglang_dcp.ops.chains_triton import attend_chains_triton as attend
    else:
        attend = attend_chains  # type: ignore[assignment]
    found = attend(Chains(*moved), prefix, lse, inputs.sizes)  # type: ignore[arg-type]
    return distance(case, found, inputs.wanted)


@pytest.mark.parametrize("name", CASES)
def test_torch_form_equals_a_softmax_over_all_keys(name: str) -> None:
    inputs = make(CASES[name])
    found = attend_chains(*inputs[:3], inputs.sizes)
    assert distance(CASES[name], found, inputs.wanted) < 16


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    return interpreter.results_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel(name: str, interpreted: dict[str, float]) -> None:
    assert interpreted[name] < 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPUs, found 0")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernel(name: str) -> None:
    assert kernel_distance(name, "cuda") < 16


def test_a_later_token_changes_nothing() -> None:
    inputs = make(CASES["one-kv-head"])
    before = attend_chains_torch(*inputs[:3], inputs.sizes)
    inputs.chains.k[1::2] = inputs.chains.v[1::2] = 100.0
    after = attend_chains_torch(*inputs[:3], inputs.sizes)
    assert torch.equal(before[::2], after[::2])
    assert not torch.equal(before[1::2], after[1::2])


def test_wrong_arguments() -> None:
    chains, prefix, lse, sizes, _ = make(CASES["uneven"])
    with pytest.raises(ValueError, match="not chains of 5"):
        attend_chains(chains, prefix, lse, sizes._replace(width=5))
    with pytest.raises(ValueError, match="a prefix of"):
        attend_chains(chains, prefix[..., 1:], lse, sizes)
    with pytest.raises(ValueError, match="do not fit q"):
        attend_chains(chains._replace(k=chains.k[..., 1:]), prefix, lse, sizes)
    with pytest.raises(ValueError, match="come together"):
        attend_chains(chains._replace(q_rope=chains.q), prefix, lse, sizes)
    with pytest.raises(ValueError, match="more than 2 K/V heads"):
        attend_chains(chains, prefix, lse, sizes._replace(first_head=4))
    with pytest.raises(TypeError, match="int32"):
        attend_chains(chains, prefix.int(), lse, sizes)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        # The interpreter takes bfloat16 for integers in products.
        for name, case in CASES.items():
            if case.dtype == torch.bfloat16:
                CASES[name] = case._replace(dtype=torch.float16)
        found = {name: kernel_distance(name, "cpu") for name in CASES}
        print(json.dumps(found))
        sys.exit(0)
    sys.exit(pytest.main([__file__]))
