"""When a prefill takes less time as a decode step: pure functions of logical lengths.

Each new token is a row of the step, and reads all keys before its own. That is more work for
the GPU than a prefill. A captured step has no launches, a prefill has those of its layers and
of its form. So a step pays for few new tokens. Weights are read in both, and do not count
here.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_dcp.layers.prefix.cost import FLOPS, Requests, exchange_seconds
from sglang_dcp.layers.prefix.rates import HOPPER, Rates


class StepSizes(NamedTuple):
    """Sizes of a rank's attention in a decode step.

    Attributes
    ----------
    heads : query heads of the rank
    dcp_size : ranks that share out the keys
    key_bytes : bytes of a position in the rank's pool, with all K/V heads that it has
    query_bytes, out_bytes : bytes of one head of a query, and of a partial output
    dims : multiplications for each query head and key
    """

    heads: int
    dcp_size: int
    key_bytes: int
    query_bytes: int
    out_bytes: int
    dims: int


def step_seconds(requests: Requests, sizes: StepSizes, rates: Rates) -> float:
    """Time what the GPU does for a layer when each new token is a row of a decode step."""
    rows = sum(requests.new)
    pairs = sum(new * (2 * prefix + new + 1) // 2 for new, prefix in zip(*requests))
    keys = pairs / sizes.dcp_size
    read = keys * sizes.key_bytes / rates.memory_bytes
    heads = sizes.heads * sizes.dcp_size
    multiplied = FLOPS * keys * heads * sizes.dims / rates.absorbed_split_flops
    exchange = exchange_seconds(
        rows * sizes.heads, sizes.dcp_size, sizes.query_bytes, sizes.out_bytes, rates
    )
    return rows * rates.layer_token_s + max(read, multiplied) + exchange


def pays_as_step(
    requests: Requests,
    sizes: StepSizes,
    form_s: float,
    *,
    eager: bool,
    rates: Rates = HOPPER,
) -> bool:
    """Whether a prefill takes less time as a captured decode step.

    The result is the same on all ranks.

    Parameters
    ----------
    form_s : seconds that the form of the prefill adds to the launches of a layer
    eager : whether the prefill would run without a CUDA graph
    """
    host = rates.eager_layer_host_s if eager else rates.layer_host_s
    return step_seconds(requests, sizes, rates) <= host + form_s
