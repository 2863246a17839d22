"""GPU memory that a decode step with DCP takes outside of the KV pool.

A verification is a decode step whose kernel sees one row for each request, with the heads
of all its query tokens. Queries are gathered, and outputs are exchanged, as rows of single
tokens. `forward_memory` says what is counted and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from sglang_dcp.layers.backends.fa3_splits import Fa3Heads, decode_split_bytes
from sglang_dcp.layers.forward_memory import (
    OUTPUTS,
    SPLITS,
    attending,
    exchanging,
    gathering,
    joined,
    local_state,
    peak,
    state_bytes,
)
from sglang_dcp.layers.forward_sizes import ForwardSizes, Parts

_FLOAT = 4
PLANNED = "splits that are planned"


def decode_parts(
    sizes: ForwardSizes, requests: int, *, captured: bool = False
) -> Parts:
    """Return what lives at the peak of a decode step of `requests` requests.

    Each of them brings `sizes.width` query tokens. Plans of captured steps are made once.
    """
    if not requests:
        return {}
    planned = _planned_bytes(sizes, requests)
    held = {PLANNED: planned}
    if sizes.replicated_q:
        numbers = requests * sizes.width * sizes.group_heads * sizes.qk_dim
        held["projected queries of the DCP group"] = numbers * sizes.itemsize
    moments = [held | moment for moment in _moments(sizes, requests)]
    if not captured:
        # An eager step is planned while the plan of the one before is still there.
        moments.append(held | {"splits of the step before": planned})
    return peak(moments)


def _planned_bytes(sizes: ForwardSizes, requests: int) -> int:
    """Return the bytes of what is planned for all layers: outputs and LSE in float32."""
    of_head, more = sizes.planned_outputs
    outputs = requests * sizes.folding.heads * of_head * (sizes.v_dim + 1)
    # Those of the other kernel have two sums.
    return (outputs + more * (sizes.v_dim + 2)) * _FLOAT


def _moments(sizes: ForwardSizes, requests: int) -> Iterable[Parts]:
    tokens = requests * sizes.width
    if not sizes.replicated_q:
        own = joined(sizes, tokens, with_keys=False)
        for moment in gathering(sizes, tokens):
            yield own | moment
    attended = attending(sizes, requests, sizes.folding.heads)
    attended[SPLITS] = _split_bytes(sizes, requests)
    yield attended
    if sizes.width > 1:
        yield from _folding(sizes, requests)
        yield from _chains(sizes, tokens)
    yield exchanging(sizes, tokens)


def _split_bytes(sizes: ForwardSizes, requests: int) -> int:
    if sizes.backend != "fa3" or not sizes.splits:
        return 0
    heads = sizes.folding.heads
    of_call = Fa3Heads(heads, sizes.kv_heads, sizes.qk_dim, sizes.v_dim)
    return decode_split_bytes(of_call, requests)


def _folding(sizes: ForwardSizes, requests: int) -> Iterable[Parts]:
    """Query tokens become heads, and outputs become those of tokens again."""
    folding, tokens = sizes.folding, requests * sizes.width
    of_token = sizes.group_heads * sizes.qk_dim * sizes.itemsize
    gathered = 0 if sizes.replicated_q else tokens * of_token
    copies = 0
    # With one K/V head, what was gathered is viewed. Projected queries have strides.
    if sizes.kv_heads > 1 or sizes.replicated_q:
        copies = tokens * of_token
    if folding.padded > folding.width * folding.group:
        copies += requests * folding.heads * sizes.qk_dim * sizes.itemsize
    yield {"gathered queries": gathered, "queries folded into heads": copies}
    # With one K/V head, outputs are viewed too, and only their LSE is copied.
    copied = 0 if sizes.kv_heads == 1 else sizes.v_dim
    yield {
        OUTPUTS: state_bytes(folding.heads, sizes.v_dim, requests, sizes.itemsize),
        "outputs of tokens": state_bytes(
            sizes.group_heads, copied, tokens, sizes.itemsize
        ),
    }


def _chains(sizes: ForwardSizes, tokens: int) -> Iterable[Parts]:
    """Local heads attend to the query tokens themselves, and merge the prefix."""
    held = {"merged prefix": local_state(sizes, tokens)}
    rounded = 0
    if sizes.quantized:
        # As they are read from the pool. Meanwhile one of them is in float32, twice.
        of_keys, of_values = (
            tokens * sizes.kv_heads * dim for dim in (sizes.qk_dim, sizes.v_dim)
        )
        rounded = (of_keys + of_values) * sizes.itemsize
        amid = of_keys * sizes.itemsize + 2 * max(of_keys, of_values) * _FLOAT
        yield held | {"rounding of keys and values": amid}
    output = local_state(sizes, tokens)
    yield held | {"rounded keys and values": rounded, "merged output": output}
