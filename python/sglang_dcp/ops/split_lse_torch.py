"""The LSE of a split-KV decode in plain torch: the reference of ``split_lse``."""

from __future__ import annotations

import torch


def reduce_split_lse_torch(
    split_lse: torch.Tensor,
    kv_indptr: torch.Tensor,
    num_kv_splits: torch.Tensor,
    min_block_kv: int,
) -> torch.Tensor:
    """Compute `split_lse.reduce_split_lse` token by token.

    `min_block_kv` is the `_MIN_BLOCK_KV` of SGLang's decode kernel.
    """
    rows, heads, _ = split_lse.shape
    out = split_lse.new_full((rows, heads), float("-inf"))
    for row in range(rows):
        keys = int(kv_indptr[row + 1] - kv_indptr[row])
        each = -(-keys // int(num_kv_splits[row]))
        each = -(-each // min_block_kv) * min_block_kv
        used = -(-keys // each) if keys else 0
        if used:
            out[row] = torch.logsumexp(split_lse[row, :, :used], -1)
    return out
