"""GPU memory that a prefill with DCP takes outside of the KV pool: pure functions of sizes.

A forward allocates its largest tensors in one layer and frees them before the next. So
its peak is that of one layer. Each function below lists what lives at some moments of a
layer, and takes the largest of them. The queries, keys and values that a model hands in
are SGLang's and not counted.

Nothing here depends on the length of a prompt: new tokens end at the prefill chunk,
gathered latents at `SGLANG_MAX_KV_CHUNK_CAPACITY`, their chunks at `MOST_PREFIX_CHUNKS`,
gathered K/V heads at `MOST_GATHERED_BYTES`.
Lists of slots take 4 or 8 bytes a cached position, a `dcp_size`-th of SGLang's own, and are
left out. `decode_memory` is about decode steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from sglang_dcp.layers.backends.fa3_splits import (
    Fa3Heads,
    prefix_split_bytes,
    ragged_split_bytes,
)
from sglang_dcp.layers.forward_sizes import Expansion, ForwardSizes, Parts
from sglang_dcp.layers.mla.form import MOST_PREFIX_CHUNKS
from sglang_dcp.layers.prefix.kv_form import KvSizes
from sglang_dcp.ops.partials_torch import packed_bytes

_LSE = 4
_INDEX = 8
# Vectors of one index a position that live while a gather is planned.
_PLAN_VECTORS = 12
# FlashInfer's wrapper of one prefix chunk, or of a gathered prefix.
_WRAPPER_BYTES = 8 << 20

OUTPUTS, COPIES = "partial outputs", "copies of queries and outputs"
SPLITS = "splits of the kernel"

# So many rows (tokens x heads) fit into one of FlashInfer's plans for latents.
_PLAN_ROWS = 8192 * 128


def prefill_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of a prefill of `tokens` new tokens, over any prefix."""
    if not sizes.has_prefix:
        return _new_tokens(sizes, tokens)
    in_place = peak(_prefix_in_place(sizes, tokens))
    expanded, gathered = expanded_parts(sizes, tokens), gathered_parts(sizes, tokens)
    return peak([_new_tokens(sizes, tokens), in_place, expanded, gathered])


def peak(moments: Iterable[Parts]) -> Parts:
    return max(moments, key=lambda parts: sum(parts.values()))


def state_bytes(heads: int, dim: int, tokens: int, itemsize: int) -> int:
    """Return the bytes of an output and its LSE."""
    return tokens * heads * (dim * itemsize + _LSE)


def local_state(sizes: ForwardSizes, tokens: int) -> int:
    return state_bytes(sizes.heads, sizes.v_dim, tokens, sizes.itemsize)


def joined(sizes: ForwardSizes, tokens: int, *, with_keys: bool = True) -> Parts:
    """Return MLA's two parts of queries and keys, put into one tensor each."""
    if not sizes.latent:
        return {}
    rows = tokens * (sizes.heads + with_keys)
    return {"queries of this rank": rows * sizes.qk_dim * sizes.itemsize}


def _new_tokens(sizes: ForwardSizes, tokens: int) -> Parts:
    """New tokens attend to themselves: copies for the kernel, and an output."""
    dims = sizes.qk_dim + sizes.v_dim
    numbers = sizes.heads * sizes.qk_dim + sizes.kept_kv_heads * dims
    copied = tokens * numbers * sizes.itemsize
    if sizes.quantized:
        # Divided by their scales, then rounded.
        copied += tokens * sizes.kept_kv_heads * dims * sizes.itemsize
        copied += tokens * numbers * sizes.stored_itemsize
    return joined(sizes, tokens) | {
        "copies of new queries, keys and values": copied,
        "new tokens' output": local_state(sizes, tokens),
    }


def _prefix_in_place(sizes: ForwardSizes, tokens: int) -> Iterable[Parts]:
    """Gathered queries attend to the rank's part of the prefix, and outputs are merged."""
    state, heads = local_state(sizes, tokens), sizes.group_heads
    held = joined(sizes, tokens) | {"new tokens' output": state}
    attended = attending(sizes, tokens, heads)
    if sizes.backend == "fa3" and sizes.splits:
        of_call = Fa3Heads(heads, sizes.kv_heads, sizes.qk_dim, sizes.v_dim)
        attended[SPLITS] = prefix_split_bytes(of_call, tokens)
    in_parts = sizes.latent and sizes.backend == "flashinfer"
    if in_parts and tokens * heads > _PLAN_ROWS:
        # Some heads at a time, whose outputs are joined.
        attended[COPIES] += attended[OUTPUTS]
    for moment in (*gathering(sizes, tokens), attended, exchanging(sizes, tokens)):
        yield held | moment
    yield held | {"merged output": 2 * state}


def gathering(sizes: ForwardSizes, tokens: int) -> Iterable[Parts]:
    """Gather queries. Those of MLA, joined, are not among them."""
    own = tokens * sizes.heads * sizes.qk_dim * sizes.itemsize
    queries = own * sizes.dcp_size
    # A copy that is contiguous, as joined ones are, and what NCCL fills.
    yield {"gathered queries": queries + (0 if sizes.latent else own)}
    # Put in order of tokens.
    yield {"gathered queries": 2 * queries}


def attending(sizes: ForwardSizes, rows: int, heads: int) -> Parts:
    """Attend with `rows` queries of `heads` heads each, without splits of the kernel."""
    numbers = rows * heads
    cast = 0
    if sizes.quantized and sizes.backend != "triton":
        # Rounded queries, then outputs: FA3 returns bfloat16, whatever the model's dtype.
        rounded = numbers * sizes.qk_dim * sizes.stored_itemsize
        cast = max(rounded, numbers * sizes.v_dim * sizes.itemsize)
    return {
        # Gathered, or with replicated Q a copy that is contiguous.
        "queries of the DCP group": numbers * sizes.qk_dim * sizes.itemsize,
        OUTPUTS: state_bytes(heads, sizes.v_dim, rows, sizes.itemsize),
        COPIES: cast,
    }


def exchanging(sizes: ForwardSizes, tokens: int) -> Parts:
    """Exchange the outputs of all heads of the DCP group."""
    heads = sizes.group_heads
    return {
        OUTPUTS: state_bytes(heads, sizes.v_dim, tokens, sizes.itemsize),
        "rows for peers and from them": _exchange_bytes(sizes, tokens),
    }


def _exchange_bytes(sizes: ForwardSizes, tokens: int) -> int:
    """Return the bytes of rows received, of rows sent or the merged output, and of LSEs.

    `symm_a2a` sends what its inboxes do not hold by `a2a`.
    """
    rows = tokens * sizes.heads
    lse = rows * sizes.dcp_size * _LSE
    width = sizes.v_dim * sizes.itemsize
    if sizes.gathers_lse:
        lse += lse * sizes.dcp_size
    else:
        width = packed_bytes(sizes.v_dim, sizes.itemsize)
    received = (sizes.dcp_size - 1) * rows * width
    # The output takes the place of what was sent.
    return received + max(received, local_state(sizes, tokens)) + lse


def gathered_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of a prefill that gathers its prefix, if one does."""
    return peak(_prefix_gathered(sizes, tokens)) if sizes.gathered else {}


def _prefix_gathered(sizes: ForwardSizes, tokens: int) -> Iterable[Parts]:
    """Local queries attend to K and V that come from all ranks, and to new ones behind them.

    Rows of ranks that have fewer than others are padded by one position of each request at
    most, which is left out.
    """
    dims = sizes.qk_dim, sizes.v_dim, sizes.itemsize
    kv = KvSizes(sizes.heads, sizes.kv_heads, sizes.dcp_size, *dims)
    own = -(-sizes.gathered // sizes.dcp_size)
    keys = sizes.gathered + tokens
    held = {"plan of the gather": _INDEX * (sizes.gathered + own + keys + tokens)}
    if sizes.backend == "flashinfer":
        held["FlashInfer's wrappers"] = _WRAPPER_BYTES
    row = kv.row_bytes(kv.window)
    # Sent, this rank's own, and received. Beside them the rows before they are packed, or
    # in order.
    blocks = (2 * sizes.dcp_size - 1) * own * row
    yield held | {
        "gathered K and V": blocks + (own * sizes.dcp_size + tokens) * row,
    }
    copied = keys * kv.row_bytes(kv.kept) if kv.kept > kv.window else 0
    apart = tokens * kv.row_bytes(kv.kept) if sizes.backend == "triton" else 0
    queries = tokens * sizes.heads * sizes.qk_dim * sizes.itemsize
    scratch = _ragged_splits(sizes, kv.kept, *dims[:2], tokens)
    yield held | {
        "gathered K and V": keys * row + copied + apart,
        "queries, and their output": queries + local_state(sizes, tokens),
        SPLITS: scratch,
    }


def _ragged_splits(
    sizes: ForwardSizes, kv_heads: int, qk: int, v: int, tokens: int
) -> int:
    """Return the bytes of splits over keys that were gathered."""
    if sizes.backend != "fa3" or not sizes.splits:
        return 0
    return ragged_split_bytes(Fa3Heads(sizes.heads, kv_heads, qk, v), tokens)


def expanded_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of an expanded prefill over a prefix, if there is one.

    One prefix chunk is gathered, expanded and attended to, beside the new tokens. One
    shot takes no more, because it counts new tokens among the positions. SGLang expands
    as many positions without DCP, from a prefix of 8192 on.
    """
    return peak(_expanded(sizes, tokens, sizes.expansion)) if sizes.expansion else {}


def _expanded(sizes: ForwardSizes, tokens: int, form: Expansion) -> Iterable[Parts]:
    state = state_bytes(sizes.heads, form.v, tokens, sizes.itemsize)
    new = tokens * sizes.heads * form.expanded * sizes.itemsize
    chunk = form.positions * sizes.heads * form.expanded * sizes.itemsize
    gathered = form.positions * form.stored * sizes.itemsize
    held = {"plans of the gather": plan_bytes(sizes, form)}
    if sizes.backend == "flashinfer":
        held["FlashInfer's wrappers"] = MOST_PREFIX_CHUNKS * _WRAPPER_BYTES
    held["new tokens, expanded, and their output"] = new + state
    if form.in_place:
        some = min(tokens, form.in_place)
        # Their queries and outputs, as heads have them, are less than as latents.
        yield from (held | moment for moment in _prefix_in_place(sizes, some))
    yield held | {"latents": gather_bytes(sizes, form)}
    yield held | {"latents": gathered, "expanded K and V": chunk}
    dims = form.nope + form.rope, form.v
    yield held | {
        "expanded K and V": chunk,
        "output of the chunk": state,
        SPLITS: _ragged_splits(sizes, sizes.heads, *dims, tokens),
    }
    # Output of the chunk, and of the merge.
    yield held | {"expanded K and V": chunk, "merged output": 3 * state}


def plan_bytes(sizes: ForwardSizes, form: Expansion) -> int:
    """Return the bytes of the plans of all prefix chunks, and of making one."""
    own = -(-form.positions // sizes.dcp_size)
    kept = MOST_PREFIX_CHUNKS * (form.positions + own)
    return _INDEX * (kept + _PLAN_VECTORS * form.positions)


def gather_bytes(sizes: ForwardSizes, form: Expansion) -> int:
    """Return the bytes of latents when most live: received and ordered, or ordered and cast.

    Received ones are padded by one position of each request and rank at most, which is
    left out.
    """
    stored = form.positions * form.stored * sizes.stored_itemsize
    cast = form.positions * form.stored * sizes.itemsize if sizes.quantized else 0
    return stored + max(stored, cast)
