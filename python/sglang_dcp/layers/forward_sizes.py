"""The sizes by which the GPU memory of a rank's attention is computed."""

from __future__ import annotations

from typing import NamedTuple, Optional

from sglang_dcp.ops.query_rows import Folding, folding_of

# Bytes by what they hold, in words for a log line.
Parts = dict[str, int]


class Expansion(NamedTuple):
    """The expanded form of an MLA prefill.

    Attributes
    ----------
    latent, rope, nope, v : dims of a latent, of its rotary key, and of an expanded head
    positions : most positions that are gathered and expanded at once
    in_place : most new tokens whose prefix stays in place beside, in a prefill by group
    """

    latent: int
    rope: int
    nope: int
    v: int
    positions: int
    in_place: int = 0

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
    planned_outputs : see `InnerBackend`
    expansion : the expanded form, if there is one
    has_prefix : whether new tokens may see K/V that a request has in the pool
    gathered : most cached positions whose K/V heads a prefill gathers; 0 if it never does
    width : query tokens of each request in a decode step, 1 without speculation
    head_tile : see `folding_of`
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
    planned_outputs: tuple[int, int] = (0, 0)
    expansion: Optional[Expansion] = None
    has_prefix: bool = True
    gathered: int = 0
    width: int = 1
    head_tile: Optional[int] = None

    @property
    def group_heads(self) -> int:
        return self.heads * self.dcp_size

    @property
    def folding(self) -> Folding:
        """How the query tokens of a request become heads of one query."""
        return folding_of(self.width, self.group_heads, self.kv_heads, self.head_tile)

    @property
    def quantized(self) -> bool:
        return self.stored_itemsize < self.itemsize
