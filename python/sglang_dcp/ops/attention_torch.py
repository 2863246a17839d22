"""Attention with its log-sum-exp (LSE) in plain torch: the CPU path and the reference."""

from __future__ import annotations

import torch

# Queries that are computed together: at most so many, and so many scores with all heads.
_QUERY_BLOCK = 256
_BLOCK_SCORES = 1 << 26


def attention_with_lse_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention of one request over the given keys.

    Parameters
    ----------
    q : Tensor [queries, heads, qk_dim]
    k : Tensor [keys, kv_heads, qk_dim]
    v : Tensor [keys, kv_heads, v_dim]
        `heads` is a multiple of `kv_heads`. Query head h uses K/V head
        `h * kv_heads // heads`.
    scaling : float
        Scores are multiplied by it.
    causal : bool
        If true, query i of n sees the keys 0 to `keys - n + i`.

    Returns
    -------
    out : Tensor [queries, heads, v_dim]
        In q's dtype. It is 0 where a query sees no key.
    lse : Tensor [queries, heads]
        Natural log, in float32, or in float64 for float64 input. It is -inf where a
        query sees no key.
    """
    rows = query_block(q.shape[1], k.shape[0])
    blocks = [
        _attend_block(q, k, v, start, rows, scaling, causal)
        for start in range(0, q.shape[0], rows)
    ]
    if not blocks:
        return q.new_empty(0, q.shape[1], v.shape[2]), _empty_lse(q)
    out, lse = zip(*blocks)
    return torch.cat(out), torch.cat(lse)


def query_block(heads: int, keys: int) -> int:
    """Return how many queries are computed together, so that their scores are bounded."""
    return max(1, min(_QUERY_BLOCK, _BLOCK_SCORES // max(1, heads * keys)))


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, q.shape[1], dtype=_wide(q.dtype), device=q.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attend_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: int,
    rows: int,
    scaling: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    queries, keys, kv_heads = q.shape[0], k.shape[0], k.shape[1]
    block = q[start : start + rows]
    n, heads, qk_dim = block.shape
    group, v_dim = heads // kv_heads, v.shape[2]
    wide = _wide(q.dtype)
    # [n, kv_heads, group, d] -> [kv_heads, n * group, d]: one product for each K/V head
    grouped = block.to(wide).view(n, kv_heads, group, qk_dim).transpose(0, 1)
    grouped = grouped.reshape(kv_heads, n * group, qk_dim)
    scores = grouped @ k.to(wide).permute(1, 2, 0) * scaling
    scores = scores.view(kv_heads, n, group, keys)
    if causal:
        last = torch.arange(start, start + n, device=q.device) + keys - queries
        hidden = torch.arange(keys, device=q.device) > last[:, None]
        scores = scores.masked_fill(hidden[None, :, None, :], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    out = weights.view(kv_heads, n * group, keys) @ v.to(wide).transpose(0, 1)
    out = out.view(kv_heads, n, group, v_dim).transpose(0, 1)
    out = out.reshape(n, heads, v_dim).to(q.dtype)
    return out, lse.transpose(0, 1).reshape(n, heads)
