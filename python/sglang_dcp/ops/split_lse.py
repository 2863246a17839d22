"""Reduces the LSEs that SGLang's Triton decode leaves, one for each split of the keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# mypy: allow-untyped-defs


def reduce_split_lse(
    split_lse: torch.Tensor, kv_indptr: torch.Tensor, num_kv_splits: torch.Tensor
) -> torch.Tensor:
    """Compute one LSE for each head from the splits that decode has written.

    Safe in CUDA-graph capture.

    Parameters
    ----------
    split_lse : Tensor [tokens, heads, max_splits] float32
        Natural log. Entries of splits without keys may hold anything.
    kv_indptr : Tensor [tokens + 1] int32
        Cumulated key counts, from 0 on.
    num_kv_splits : Tensor [>= tokens] int32
        Number of splits that decode was asked for, for each token.

    Returns
    -------
    Tensor [tokens, heads] float32
        Natural log. It is -inf for a token without keys.
    """
    from sglang.kernels.ops.attention.decode_attention import _MIN_BLOCK_KV

    tokens, heads, splits = split_lse.shape
    out = split_lse.new_empty(tokens, heads)
    if tokens:
        _reduce[(tokens, heads)](
            split_lse,
            kv_indptr,
            num_kv_splits,
            out,
            split_lse.stride(0),
            split_lse.stride(1),
            heads,
            splits,
            MIN_BLOCK_KV=_MIN_BLOCK_KV,
            BLOCK=triton.next_power_of_2(splits),
        )
    return out


@triton.jit
def _reduce(
    split_lse,
    kv_indptr,
    num_kv_splits,
    out,
    stride_token,
    stride_head,
    heads,
    splits,
    MIN_BLOCK_KV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    keys = tl.load(kv_indptr + token + 1) - tl.load(kv_indptr + token)
    asked = tl.load(num_kv_splits + token)
    # The decode kernel splits at whole blocks, so it may use fewer splits than asked.
    each = tl.cdiv(tl.cdiv(keys, asked), MIN_BLOCK_KV) * MIN_BLOCK_KV
    split = tl.arange(0, BLOCK)
    used = (split < splits) & (split * each < keys)
    row = split_lse + token * stride_token + head * stride_head
    lse = tl.load(row + split, mask=used, other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.where(used, tl.exp(lse - top), 0.0), 0)
    merged = tl.where(keys > 0, top + tl.log(total), float("-inf"))
    tl.store(out + token * heads + head, merged)
