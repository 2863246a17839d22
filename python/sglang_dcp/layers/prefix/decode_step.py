"""When a prefill takes less time as a decode step: pure functions of logical lengths.

Each new token is a row of the step, and reads all keys before its own. That is more work for
the GPU than a prefill. As a chain, the new tokens of one request read its prefix once, and
their heads fill the tiles of attention, which the heads of one row do not. A
captured step has no launches, a prefill has those of its layers and of its form. So a step
pays for few new tokens. Weights are read in both, and do not count here.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from sglang_dcp.layers.prefix.cost import FLOPS, Requests, exchange_seconds
from sglang_dcp.layers.prefix.rates import HOPPER, Rates


class StepSizes(NamedTuple):
    """Sizes of a rank's attention in a decode step.

    Attributes
    ----------
    heads : query heads of the rank
    kv_heads : K/V heads of the rank
    dcp_size : ranks that share out the keys
    key_bytes : bytes of a position in the rank's pool, with all K/V heads that it has
    query_bytes, out_bytes : bytes of one head of a query, and of a partial output
    dims : multiplications for each query head and key
    """

    heads: int
    kv_heads: int
    dcp_size: int
    key_bytes: int
    query_bytes: int
    out_bytes: int
    dims: int


def step_seconds(requests: Requests, sizes: StepSizes, rates: Rates) -> float:
    """Time what the GPU does for a layer when each new token is a row of a decode step."""
    pairs = sum(new * (2 * prefix + new + 1) // 2 for new, prefix in zip(*requests))
    keys = sum(requests.new) + sum(requests.prefix)
    return _layer_seconds(sum(requests.new), 1, pairs, keys, sizes, rates)


def chain_seconds(width: int, prefix: int, sizes: StepSizes, rates: Rates) -> float:
    """Time what the GPU does for a layer when the new tokens are a chain.

    The keys of the prefix are read once. Each token of the chain is multiplied with them,
    also those that only fill its `width`. The rank's own heads attend to the tokens
    themselves, which another kernel does.
    """
    of_prefix = _layer_seconds(width, width, prefix, prefix, sizes, rates)
    return of_prefix + rates.chain_s


def chain_is_faster(
    new: int, prefix: int, width: int, sizes: StepSizes, rates: Rates = HOPPER
) -> bool:
    """Whether a step of one request takes less time as a chain than as rows.

    `width` is the number of tokens of the chain, those that fill it included.
    """
    of_rows = step_seconds(Requests([new], [prefix]), sizes, rates)
    return chain_seconds(width, prefix, sizes, rates) < of_rows


def _layer_seconds(
    rows: int, folded: int, reads: int, keys: int, sizes: StepSizes, rates: Rates
) -> float:
    """Return what the GPU takes for a layer, in seconds.

    Parameters
    ----------
    rows : tokens of the step
    folded : tokens whose heads are heads of one query
    reads : positions that all queries read together, on all ranks
    keys : positions that at least one query reads, on all ranks
    """
    first = keys * sizes.key_bytes / rates.memory_bytes
    again = reads * sizes.key_bytes / rates.reread_bytes
    tile = rates.absorbed_tile
    heads = folded * sizes.heads * sizes.dcp_size // sizes.kv_heads
    tiled = -(-heads // tile) * tile * sizes.kv_heads
    products = FLOPS * reads * tiled * sizes.dims / rates.step_flops
    exchange = exchange_seconds(
        rows * sizes.heads, sizes.dcp_size, sizes.query_bytes, sizes.out_bytes, rates
    )
    attention_s = max(first, again, products) / sizes.dcp_size
    return rows * rates.layer_token_s + attention_s + exchange


def pays_as_step(
    requests: Requests,
    sizes: StepSizes,
    form_s: float,
    *,
    eager: bool,
    chain: Optional[int] = None,
    rates: Rates = HOPPER,
) -> bool:
    """Whether a prefill takes less time as a captured decode step.

    The result is the same on all ranks.

    Parameters
    ----------
    form_s : seconds that the form of the prefill adds to the launches of a layer
    eager : whether the prefill would run without a CUDA graph
    chain : tokens of the chain that the step of one request is, if it is one
    """
    host = rates.eager_layer_host_s if eager else rates.layer_host_s
    if chain is None:
        seconds = step_seconds(requests, sizes, rates)
    else:
        seconds = chain_seconds(chain, requests.prefix[0], sizes, rates)
    return seconds <= host + form_s
