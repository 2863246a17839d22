"""GPU memory that attention with DCP takes outside of the KV pool: pure functions of sizes.

A forward allocates its largest tensors in one layer and frees them before the next. So
its peak is that of one layer. Each function below lists what lives at some moments of a
layer, and takes the largest of them. The queries, keys and values that a model hands in
are SGLang's and not counted.

Nothing here depends on the length of a prompt: new tokens end at the prefill chunk,
gathered latents at `SGLANG_MAX_KV_CHUNK_CAPACITY`, their chunks at `MOST_PREFIX_CHUNKS`,
gathered K/V heads at `MOST_GATHERED_BYTES`.
Lists of slots take 4 bytes a cached position, a `dcp_size`-th of SGLang's own, and are left
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional

from sglang_dcp.layers.backends.fa3_splits import (
    Fa3Heads,
    decode_split_bytes,
    prefix_split_bytes,
)
from sglang_dcp.layers.mla.form import MOST_PREFIX_CHUNKS
from sglang_dcp.layers.prefix.kv_form import KvSizes
from sglang_dcp.ops.partials_torch import packed_bytes

_LSE = 4
_INDEX = 8
# Vectors of one index a position that live while a gather is planned.
_PLAN_VECTORS = 12
# FlashInfer's wrapper of one prefix chunk, or of a gathered prefix.
_WRAPPER_BYTES = 8 << 20

# So many rows (tokens x heads) fit into one of FlashInfer's plans for latents.
_PLAN_ROWS = 8192 * 128

# Bytes by what they hold, in words for a log line.
Parts = dict[str, int]


class Expansion(NamedTuple):
    """The expanded form of an MLA prefill.

    Attributes
    ----------
    latent, rope, nope, v : dims of a latent, of its rotary key, and of an expanded head
    positions : most positions that are gathered and expanded at once
    """

    latent: int
    rope: int
    nope: int
    v: int
    positions: int

    @property
    def stored(self) -> int:
        """Numbers of a position in the pool."""
        return self.latent + self.rope

    @property
    def expanded(self) -> int:
        """Numbers of an expanded position and head: the product, and K beside it."""
        return self.nope + self.v + self.nope + self.rope


class ForwardSizes(NamedTuple):
    """Sizes of a rank's attention.

    Attributes
    ----------
    backend : name of the attention backend
    heads, dcp_size : query heads of a rank, and ranks of a DCP group
    kv_heads, kept_kv_heads : K/V heads in a rank's pool, and most of them, copies included,
        that a rank takes for its query heads
    qk_dim, v_dim : dims of attention to the pool; of MLA those of latents
    itemsize, stored_itemsize : bytes of a number of the model, and in the pool
    latent : whether attention is MLA
    replicated_q : whether decode projects the queries of all ranks
    gathers_lse : whether the exchange gathers the LSE apart (`ag_rs`)
    splits : whether FA3 may split keys, as it may not in deterministic inference
    triton_splits : most splits of keys in a decode step of `triton`
    expansion : the expanded form, if there is one
    has_prefix : whether new tokens may see K/V that a request has in the pool
    gathered : most cached positions whose K/V heads a prefill gathers; 0 if it never does
    """

    backend: str
    heads: int
    dcp_size: int
    kv_heads: int
    kept_kv_heads: int
    qk_dim: int
    v_dim: int
    itemsize: int
    stored_itemsize: int
    latent: bool = False
    replicated_q: bool = False
    gathers_lse: bool = False
    splits: bool = True
    triton_splits: int = 8
    expansion: Optional[Expansion] = None
    has_prefix: bool = True
    gathered: int = 0

    @property
    def group_heads(self) -> int:
        return self.heads * self.dcp_size

    @property
    def quantized(self) -> bool:
        return self.stored_itemsize < self.itemsize


def prefill_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of a prefill of `tokens` new tokens, over any prefix."""
    if not sizes.has_prefix:
        return _new_tokens(sizes, tokens)
    in_place = _peak(_prefix_in_place(sizes, tokens))
    expanded, gathered = expanded_parts(sizes, tokens), gathered_parts(sizes, tokens)
    return _peak([_new_tokens(sizes, tokens), in_place, expanded, gathered])


def decode_parts(sizes: ForwardSizes, rows: int) -> Parts:
    """Return what lives at the peak of a decode step of `rows` rows."""
    held, scratch = _joined(sizes, rows, with_keys=False), 0
    if sizes.backend == "fa3" and sizes.splits:
        scratch = decode_split_bytes(_fa3_heads(sizes), rows)
    elif sizes.backend == "triton":
        # Planned for all layers.
        splits = rows * sizes.group_heads * sizes.triton_splits
        held["splits that are planned"] = splits * (sizes.v_dim + 1) * _LSE
    if sizes.replicated_q:
        numbers = rows * sizes.group_heads * sizes.qk_dim
        held["projected queries of the DCP group"] = numbers * sizes.itemsize
    gathers = not sizes.replicated_q
    return _peak(
        held | moment
        for moment in _attention_of_group(sizes, rows, scratch, gathers=gathers)
    )


def _fa3_heads(sizes: ForwardSizes) -> Fa3Heads:
    return Fa3Heads(sizes.group_heads, sizes.kv_heads, sizes.qk_dim, sizes.v_dim)


def _peak(moments: Iterable[Parts]) -> Parts:
    return max(moments, key=lambda parts: sum(parts.values()))


def _state(heads: int, dim: int, tokens: int, itemsize: int) -> int:
    """Return the bytes of an output and its LSE."""
    return tokens * heads * (dim * itemsize + _LSE)


def _local_state(sizes: ForwardSizes, tokens: int) -> int:
    return _state(sizes.heads, sizes.v_dim, tokens, sizes.itemsize)


def _joined(sizes: ForwardSizes, tokens: int, *, with_keys: bool = True) -> Parts:
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
    return _joined(sizes, tokens) | {
        "copies of new queries, keys and values": copied,
        "new tokens' output": _local_state(sizes, tokens),
    }


def _prefix_in_place(sizes: ForwardSizes, tokens: int) -> Iterable[Parts]:
    """Gathered queries attend to the rank's part of the prefix, and outputs are merged."""
    state = _local_state(sizes, tokens)
    held = _joined(sizes, tokens) | {"new tokens' output": state}
    scratch = 0
    if sizes.backend == "fa3" and sizes.splits:
        scratch = prefix_split_bytes(_fa3_heads(sizes), tokens)
    for moment in _attention_of_group(sizes, tokens, scratch, gathers=True):
        yield held | moment
    yield held | {"merged output": 2 * state}


def _attention_of_group(
    sizes: ForwardSizes, tokens: int, scratch: int, *, gathers: bool
) -> Iterable[Parts]:
    """Gather queries, attend with all heads of the DCP group, exchange the outputs."""
    own = tokens * sizes.heads * sizes.qk_dim * sizes.itemsize
    # Gathered, or with replicated Q a copy that is contiguous.
    queries = own * sizes.dcp_size
    if gathers:
        # A copy that is contiguous, and what NCCL fills.
        yield {"gathered queries": own + queries}
        # Put in order of tokens.
        yield {"gathered queries": 2 * queries}
    partial = _state(sizes.group_heads, sizes.v_dim, tokens, sizes.itemsize)
    cast = 0
    if sizes.quantized:
        # Rounded queries, then outputs: FA3 returns bfloat16, whatever the model's dtype.
        rows = tokens * sizes.group_heads
        rounded = rows * sizes.qk_dim * sizes.stored_itemsize
        cast = max(rounded, rows * sizes.v_dim * sizes.itemsize)
    in_parts = sizes.latent and sizes.backend == "flashinfer"
    if in_parts and tokens * sizes.group_heads > _PLAN_ROWS:
        # Some heads at a time, whose outputs are joined.
        cast += partial
    yield {
        "queries of the DCP group": queries,
        "partial outputs": partial,
        "copies of queries and outputs": cast,
        "splits of the kernel": scratch,
    }
    yield {
        "partial outputs": partial,
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
    return received + max(received, _local_state(sizes, tokens)) + lse


def gathered_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of a prefill that gathers its prefix, if one does."""
    return _peak(_prefix_gathered(sizes, tokens)) if sizes.gathered else {}


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
    scratch = 0
    if sizes.backend == "fa3" and sizes.splits:
        scratch = prefix_split_bytes(Fa3Heads(sizes.heads, kv.kept, *dims[:2]), tokens)
    yield held | {
        "gathered K and V": keys * row + copied + apart,
        "queries, and their output": queries + _local_state(sizes, tokens),
        "splits of the kernel": scratch,
    }


def expanded_parts(sizes: ForwardSizes, tokens: int) -> Parts:
    """Return what lives at the peak of an expanded prefill over a prefix, if there is one.

    One prefix chunk is gathered, expanded and attended to, beside the new tokens. One
    shot takes no more, because it counts new tokens among the positions. SGLang expands
    as many positions without DCP, from a prefix of 8192 on.
    """
    return _peak(_expanded(sizes, tokens, sizes.expansion)) if sizes.expansion else {}


def _expanded(sizes: ForwardSizes, tokens: int, form: Expansion) -> Iterable[Parts]:
    state = _state(sizes.heads, form.v, tokens, sizes.itemsize)
    new = tokens * sizes.heads * form.expanded * sizes.itemsize
    chunk = form.positions * sizes.heads * form.expanded * sizes.itemsize
    gathered = form.positions * form.stored * sizes.itemsize
    held = {"plans of the gather": plan_bytes(sizes, form)}
    if sizes.backend == "flashinfer":
        held["FlashInfer's wrappers"] = MOST_PREFIX_CHUNKS * _WRAPPER_BYTES
    held["new tokens, expanded, and their output"] = new + state
    yield held | {"latents": gather_bytes(sizes, form)}
    yield held | {"latents": gathered, "expanded K and V": chunk}
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
