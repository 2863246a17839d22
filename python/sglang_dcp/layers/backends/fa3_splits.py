"""How often FlashAttention-3 splits keys, and the memory that its splits take.

With more than one split FA3 allocates an output in float32 for each of them: [splits,
heads, tokens, v_dim]. By reading its source: if it may choose, it takes up to 128 splits
where few tiles of queries leave SMs idle. Where queries are many and not causal, it takes
one more for each 50 MB of a K/V head, however many tokens there are. Queries over a prefix
in place are not causal, so there the memory would grow with the length of the prompt.

A given number is an upper bound. Before each call with ragged lengths, a small kernel gives
each request as many splits as its share of the work fills SMs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# Of an H100 or H200. GPUs with fewer split less.
_SMS = 132
_MOST_SPLITS = 128
# With so many tiles of queries, splits gain no SM.
FULL_TILES = 0.8 * _SMS
# Keys of so few tiles are never split.
_FEW_KEY_TILES = 4
# Longer batches of rows of a decode step count all their tiles, which fill the GPU.
_MOST_SPLIT_REQUESTS = 992
# What the splits of a prefill over a prefix may take.
PREFIX_SPLIT_BYTES = 256 << 20
# A split of gathered keys has at least so many.
_SPLIT_KEYS = 512


class Fa3Heads(NamedTuple):
    """The heads of one call: query heads, K/V heads, and the dims of Q and K and of V."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int

    @property
    def tile(self) -> int:
        """Rows (query tokens x heads of one K/V head) of a tile."""
        if self.v_dim > 256:
            return 64
        return 192 if self.qk_dim <= 96 else 128

    def tiles(self, queries: int) -> int:
        """Count the tiles of one request."""
        rows = queries * self.heads // self.kv_heads
        return self.kv_heads * -(-rows // self.tile)

    def split_bytes(self, tokens: int) -> int:
        """Return the bytes of one split: outputs and LSE in float32."""
        return tokens * self.heads * (self.v_dim + 1) * 4


def prefix_splits(heads: Fa3Heads, tokens: int, longest: int) -> int:
    """Return the `num_splits` of attention with new tokens to a cached prefix.

    Their memory is at most `PREFIX_SPLIT_BYTES`. 0 leaves the number to FA3.

    Parameters
    ----------
    tokens, longest : int
        New tokens of the batch, and of the request with most.
    """
    own = most_splits(heads.tiles(longest))
    # Where tiles fill the SMs, FA3 would still allocate splits for its L2 cache.
    if own > 1 and own * heads.split_bytes(tokens) <= PREFIX_SPLIT_BYTES:
        return 0
    return _filling_splits(heads, tokens, longest)


def ragged_splits(heads: Fa3Heads, tokens: int, longest: int, keys: int) -> int:
    """Return the `num_splits` of attention to a gathered prefix and new tokens: at least 1.

    Their memory is at most `PREFIX_SPLIT_BYTES`. The number is never left to FA3, whose
    releases differ in what they count.

    Parameters
    ----------
    tokens, longest : int
        New tokens of the batch, and of the request with most.
    keys : int
        Keys of the request with most.
    """
    return max(1, min(_filling_splits(heads, tokens, longest), keys // _SPLIT_KEYS))


def _filling_splits(heads: Fa3Heads, tokens: int, longest: int) -> int:
    """Return as many splits as fill the SMs and fit: at least 1."""
    tiles = heads.tiles(longest)
    if tiles >= FULL_TILES:
        return 1
    fitting = PREFIX_SPLIT_BYTES // heads.split_bytes(tokens)
    return max(1, min(_MOST_SPLITS, fitting, -(-_SMS // tiles)))


def prefix_split_bytes(heads: Fa3Heads, tokens: int) -> int:
    """Return the most bytes of splits over all batches of at most `tokens` new tokens."""
    return min(PREFIX_SPLIT_BYTES, _MOST_SPLITS * heads.split_bytes(tokens))


def ragged_split_bytes(heads: Fa3Heads, tokens: int) -> int:
    """Return the most bytes of splits of gathered keys, over the same batches.

    Requests of one token have most splits.
    """
    most = _filling_splits(heads, 1, 1)
    return min(PREFIX_SPLIT_BYTES, most * heads.split_bytes(tokens)) if most > 1 else 0


def decode_split_bytes(heads: Fa3Heads, rows: int) -> int:
    """Return the most bytes of the splits of a decode step, whose number FA3 chooses."""
    splits = most_splits(heads.tiles(1))
    if splits == 1:
        return 0
    return splits * heads.split_bytes(min(rows, _MOST_SPLIT_REQUESTS))


@functools.cache
def most_splits(tiles: int) -> int:
    """Return the most splits that FA3 chooses for so many tiles, over all numbers of keys.

    It takes the fewest splits whose last wave over the SMs is nearly as full as can be.
    """
    if tiles >= FULL_TILES:
        return 1
    filled = []
    for splits in range(1, _MOST_SPLITS + 1):
        waves = tiles * splits / _SMS
        filled.append(waves / math.ceil(waves))
    chosen = []
    for most in range(_FEW_KEY_TILES + 1, _MOST_SPLITS + 1):
        enough = 0.85 * max(filled[:most])
        chosen.append(next(n for n, full in enumerate(filled, 1) if full >= enough))
    return max(chosen)
