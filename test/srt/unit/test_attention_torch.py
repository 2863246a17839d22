"""The torch attention with LSE against one softmax written out by hand, key by key.

Only this file judges the function that every other attention test, and the CPU server,
trusts: where causal masking starts, what a query without keys gives, query blocks.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch

from helpers.live_bytes import LiveBytes
from sglang_dcp.ops import attention_torch
from sglang_dcp.ops.attention_torch import (
    _QUERY_BLOCK,
    attention_with_lse_torch,
    query_block,
)

INF = float("inf")


def by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """No tensor algebra: Python floats, one query head and key at a time."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -INF, dtype=torch.float64)
    per_kv = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + i + 1 if causal else k.shape[0]
        for h in range(q.shape[1]):
            weights = [
                math.exp(
                    scaling
                    * sum(
                        a * b
                        for a, b in zip(q[i, h].tolist(), k[j, h // per_kv].tolist())
                    )
                )
                for j in range(max(0, seen))
            ]
            if not weights:
                continue
            lse[i, h] = math.log(sum(weights))
            for j, weight in enumerate(weights):
                out[i, h] += weight / sum(weights) * v[j, h // per_kv].double()
    return out, lse


def draw(
    queries: int, keys: int, heads: int, kv_heads: int, qk_dim: int, v_dim: int
) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(queries * 100 + keys)
    sizes = (
        (queries, heads, qk_dim),
        (keys, kv_heads, qk_dim),
        (keys, kv_heads, v_dim),
    )
    return [torch.randn(*size, generator=gen, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("causal", [False, True], ids=["all-keys", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "qk_dim", "v_dim"),
    [
        pytest.param(1, 1, 1, 1, 4, 4, id="one-key"),
        pytest.param(1, 9, 2, 2, 4, 4, id="decode"),
        pytest.param(7, 7, 2, 2, 4, 4, id="square"),
        pytest.param(3, 8, 2, 1, 4, 4, id="more-keys"),
        pytest.param(6, 4, 2, 1, 4, 4, id="more-queries"),
        pytest.param(3, 5, 6, 2, 4, 4, id="gqa-3"),
        pytest.param(3, 5, 6, 3, 4, 7, id="gqa-2-wide-v"),
        pytest.param(3, 5, 4, 1, 10, 8, id="mla"),
        pytest.param(2, 0, 4, 2, 4, 5, id="no-keys"),
        pytest.param(0, 3, 4, 2, 4, 5, id="no-queries"),
        pytest.param(0, 0, 4, 2, 4, 5, id="nothing"),
    ],
)
def test_equals_softmax_by_hand(
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    qk_dim: int,
    v_dim: int,
    causal: bool,
) -> None:
    q, k, v = draw(queries, keys, heads, kv_heads, qk_dim, v_dim)
    wanted, wanted_lse = by_hand(q, k, v, 0.7, causal)
    out, lse = attention_with_lse_torch(q, k, v, scaling=0.7, causal=causal)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


def test_first_queries_without_a_key_are_empty() -> None:
    """Causal with more queries than keys: the first two see nothing."""
    q, k, v = draw(5, 3, 2, 1, 4, 4)
    out, lse = attention_with_lse_torch(q, k, v, scaling=1.0, causal=True)
    assert (out[:2] == 0).all() and (lse[:2] == -INF).all()
    assert (out[2:] != 0).all() and lse[2:].isfinite().all()


@pytest.mark.parametrize("causal", [False, True], ids=["all-keys", "causal"])
@pytest.mark.parametrize("more_keys", [0, 3], ids=["new", "prefix"])
@pytest.mark.parametrize(
    "queries", [_QUERY_BLOCK, _QUERY_BLOCK + 1, 2 * _QUERY_BLOCK + 5], ids=str
)
def test_blocks_do_not_show(queries: int, more_keys: int, causal: bool) -> None:
    q, k, v = draw(queries, queries + more_keys, 2, 1, 4, 3)
    out, lse = attention_with_lse_torch(q, k, v, scaling=0.5, causal=causal)
    scores = 0.5 * torch.einsum("ihd,jd->hij", q, k[:, 0])
    if causal:
        hidden = torch.ones(queries, queries + more_keys, dtype=torch.bool)
        scores = scores.masked_fill(hidden.triu(more_keys + 1), -INF)
    wanted = torch.einsum("hij,jd->ihd", scores.softmax(-1), v[:, 0])
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    wanted_lse = scores.logsumexp(-1).T
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


def test_scores_of_a_block_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(40, 70, 4, 2, 8, 6)
    wanted = attention_with_lse_torch(q, k, v, scaling=0.5, causal=True)
    monkeypatch.setattr(attention_torch, "_BLOCK_SCORES", 3 * 4 * 70)
    with LiveBytes() as live:
        found = attention_with_lse_torch(q, k, v, scaling=0.5, causal=True)
    for got, own in zip(found, wanted):
        torch.testing.assert_close(got, own, rtol=1e-12, atol=1e-12)
    # Four copies of a block's scores in float64, copies of K and V, outputs and lists.
    numbers = 4 * 3 * 4 * 70 + 70 * 2 * (8 + 6) + 2 * 40 * 4 * 7
    assert live.peak <= 8 * numbers + 4096
    assert query_block(8, 1 << 23) == 1


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 1e-6, id="fp32"),
        pytest.param(torch.bfloat16, 1e-2, id="bf16"),
        pytest.param(torch.float16, 1e-3, id="fp16"),
    ],
)
def test_output_in_query_dtype_lse_in_float32(
    dtype: torch.dtype, tolerance: float
) -> None:
    low = [part.to(dtype) for part in draw(4, 9, 4, 2, 8, 6)]
    q, k, v = (part.double() for part in low)
    wanted, wanted_lse = by_hand(q, k, v, 0.3, True)
    out, lse = attention_with_lse_torch(*low, scaling=0.3, causal=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    # The LSE is not rounded to the payload's dtype.
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    empty = attention_with_lse_torch(low[0][:0], *low[1:], scaling=0.3, causal=True)
    assert empty[0].dtype == dtype and empty[1].dtype == torch.float32


def test_large_scores_do_not_overflow() -> None:
    q, k, v = draw(3, 6, 2, 1, 4, 4)
    out, lse = attention_with_lse_torch(
        (1000 * q).float(), k.float(), v.float(), scaling=1.0, causal=False
    )
    assert out.isfinite().all() and lse.isfinite().all()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
