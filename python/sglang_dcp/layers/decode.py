"""Attention of a decode step, and of a verification as one.

A verification brings a chain of query tokens for each request. All of them see the
committed tokens, and attend to these as more heads of one query. That is a partial output,
which the DCP group exchanges as that of any decode step. Then each rank attends with its
local heads to the query tokens themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

from sglang_dcp.distributed.exchange import Exchange
from sglang_dcp.layers.backends.attention_calls import by_head, whole_rows
from sglang_dcp.layers.backends.base import InnerBackend, Partial
from sglang_dcp.layers.decode_rows import as_chains
from sglang_dcp.layers.kv_pool import as_read
from sglang_dcp.layers.local_batch import LocalBatch
from sglang_dcp.ops.chains import Chains, ChainSizes, attend_chains
from sglang_dcp.ops.query_rows import Folding, folding_of

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.local_batch_types import Shard


class DecodeAttention:
    """What a rank does before and after the exchange of a decode step.

    Parameters
    ----------
    backend : InnerBackend
        It plans a decode step for the heads of all query tokens of a request.
    shard : Shard
    exchange : Exchange
    kv_pool
        SGLang's pool of this rank.
    width : int
        Query tokens of each request, 1 without speculation.
    """

    def __init__(
        self,
        backend: InnerBackend,
        shard: Shard,
        exchange: Exchange,
        kv_pool: Any,
        width: int,
    ) -> None:
        self._backend = backend
        self._shard = shard
        self._exchange = exchange
        self._pool = kv_pool
        self._width = width

    def step_of(self, batch: ForwardBatch) -> tuple[ForwardBatch, int]:
        """Return `batch` as its decode step, if it is one, and the tokens of a request.

        Raises
        ------
        NotImplementedError
            The inner backend has planned for another number of query tokens.
        """
        step, width = as_chains(batch)
        if step.forward_mode.is_decode() and width != self._width:
            raise NotImplementedError(
                f"{batch.forward_mode} brings {width} query tokens of each request, and "
                f"attention plans {self._width}"
            )
        return step, width

    def attend(
        self,
        q: torch.Tensor,
        q_rope: Optional[torch.Tensor],
        layer: RadixAttention,
        local: LocalBatch,
    ) -> Partial:
        """Attend with all heads of the DCP group to the rank's local keys.

        `q` and `q_rope` are those of `DcpAttentionBackend.forward_decode`. The output is
        [tokens, heads of the DCP group, v_dim]. The query tokens of a chain see the keys as
        more heads of one query.
        """
        folding = self._folding(layer, local.width)
        if q_rope is not None:
            parts = by_head(layer, q, q_rope)
            if parts[0].shape[1] > layer.tp_q_head_num:
                # Q is replicated. Only a gather would need the two parts joined.
                latent, rope = map(folding.fold, parts)
                batch = local.forward_batch
                found = self._backend.decode_parts(latent, rope, layer, batch)
                return Partial(*map(folding.unfold, found))
        # No name holds gathered or folded queries, so that each copy frees the one before.
        found = self._backend.decode(
            folding.fold(self._of_group(q, q_rope, layer)), layer, local.forward_batch
        )
        return Partial(*map(folding.unfold, found))

    def _of_group(
        self, q: torch.Tensor, q_rope: Optional[torch.Tensor], layer: RadixAttention
    ) -> torch.Tensor:
        """Return the queries of all ranks: [tokens, heads of the DCP group, qk_dim]."""
        q = whole_rows(layer, q, q_rope)
        if q.shape[1] == layer.tp_q_head_num:
            q = self._exchange.gather_heads(q)
        return q

    def _folding(self, layer: RadixAttention, width: int) -> Folding:
        heads = layer.tp_q_head_num * self._shard.dcp_size
        return folding_of(width, heads, layer.tp_k_head_num, self._backend.head_tile)

    def attend_chains(
        self, prefix: Partial, given: Chains, layer: RadixAttention, width: int
    ) -> torch.Tensor:
        """Attend with local heads to the query tokens themselves, and merge the prefix.

        Keys and values are rounded as those are that later tokens read from the pool.

        Parameters
        ----------
        prefix : Partial
            Merged attention of the local heads to the committed tokens.
        given : Chains
            Queries, keys and values in the shapes in which a model hands them in. With
            replicated Q the queries are those of all ranks.
        width : int
            Query tokens of each request.
        """
        heads = layer.tp_q_head_num
        first = heads * self._shard.dcp_rank
        q, k, v, q_rope, k_rope = _by_head(layer, given)
        k, v, k_rope = as_read(self._pool, layer, k, v, k_rope)
        if q.shape[1] > heads:
            own = slice(first, first + heads)
            q, q_rope = q[:, own], None if q_rope is None else q_rope[:, own]
        sizes = ChainSizes(
            width=width,
            scaling=layer.scaling,
            first_head=first,
            heads_of_kv=heads * self._shard.dcp_size // k.shape[1],
            is_lse_base_on_e=self._backend.is_lse_base_on_e,
        )
        return attend_chains(Chains(q, k, v, q_rope, k_rope), *prefix, sizes)


def _by_head(layer: RadixAttention, given: Chains) -> Chains:
    """View the rows that a model hands in as [tokens, heads, dim]."""
    q, k, v, q_rope, k_rope = given
    v = v.view(v.shape[0], -1, layer.v_head_dim)
    if q_rope is None or k_rope is None:
        return Chains(whole_rows(layer, q, None), whole_rows(layer, k, None), v)
    (q, q_rope), (k, k_rope) = by_head(layer, q, q_rope), by_head(layer, k, k_rope)
    return Chains(q, k, v, q_rope, k_rope)
