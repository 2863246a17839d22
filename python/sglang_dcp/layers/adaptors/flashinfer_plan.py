"""How much one plan of FlashInfer's MLA kernels holds."""

from __future__ import annotations

from collections.abc import Sequence

# Rows (query tokens x heads) of one tile of a thread-block cluster.
_TILE, _SMALL_TILE = 128, 64
# Of a plan, by its buffers (`MLAPlan` in FlashInfer's `scheduler.cuh`), which it does not
# check; keys of at most one tile a cluster are split beyond the tiles.
_MAX_WORK, _SPLITS = 16384, 256


def heads_at_once(queries: Sequence[int], heads: int) -> int:
    """Most heads, dividing `heads`, whose tiles fit into one plan.

    Raises
    ------
    ValueError
        For more tokens than fit with one head.
    """
    for parts in range(1, heads + 1):
        if heads % parts == 0 and _work(queries, heads // parts) <= _MAX_WORK:
            return heads // parts
    raise ValueError(f"{sum(queries)} tokens do not fit into a FlashInfer MLA plan")


def _work(queries: Sequence[int], heads: int) -> int:
    small = sum(queries) * heads // len(queries) <= _SMALL_TILE
    tile = _SMALL_TILE if small else _TILE
    return sum(-(-length * heads // tile) for length in queries) + _SPLITS
