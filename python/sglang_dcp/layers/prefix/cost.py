"""What the parts of a prefill over a cached prefix cost: pure functions of logical lengths.

All times are seconds of one layer on one rank: an estimate to compare forms by, not to
predict a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sglang_dcp.layers.prefix.rates import Rates

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

FLOPS = 2  # of a multiplication and its addition
# Copies of queries and partial outputs in memory: packed, received, merged. Each is
# written and read once.
_EXCHANGE_PASSES = 6
_LSE_BYTES = 4


class Requests(NamedTuple):
    """Requests of a prefill: logical positions, the same on all ranks.

    Attributes
    ----------
    new : new tokens of each request
    prefix : cached positions of each request
    """

    new: Sequence[int]
    prefix: Sequence[int]

    @classmethod
    def of(cls, batch: ForwardBatch) -> Requests:
        """Read them from SGLang's batch of a prefill."""
        return cls(batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu)


def tiled_pairs(rows: Sequence[int], keys: Sequence[int], tile: int) -> int:
    """Count pairs of query row and key, with each request's rows in whole tiles."""
    return sum(-(-queries // tile) * tile * n for queries, n in zip(rows, keys))


def ragged_attention_seconds(
    pairs: float, longest: int, dims: int, rates: Rates
) -> float:
    """Time attention of tiles of rows, each of which one SM takes through all its keys.

    Parameters
    ----------
    pairs : pairs of query row and key
    longest : most keys that one tile of rows goes through; 0 if keys are split over SMs
    dims : multiplications for each pair
    """
    of_tile = rates.expanded_tile * longest / rates.tile_flops
    return FLOPS * dims * max(pairs / rates.expanded_flops, of_tile)


def gather_seconds(
    row_bytes: float, positions: int, dcp_size: int, passes: int, rates: Rates
) -> float:
    """Time the gather of stored rows that are copied in memory `passes` times."""
    stored = positions * row_bytes
    received = stored * (dcp_size - 1) / dcp_size
    return received / rates.gather_bytes + passes * stored / rates.memory_bytes


def exchange_seconds(
    rows: int, dcp_size: int, query_bytes: int, out_bytes: int, rates: Rates
) -> float:
    """Time the gather of queries and the exchange of partial outputs.

    `rows` is new tokens x local heads, the bytes are those of a row.
    """
    partial_bytes = out_bytes + _LSE_BYTES
    peers = rows * (dcp_size - 1)
    every = rows * dcp_size * (query_bytes + partial_bytes)
    return (
        peers * query_bytes / rates.gather_bytes
        + peers * partial_bytes / rates.exchange_bytes
        + _EXCHANGE_PASSES / 2 * every / rates.memory_bytes
    )
