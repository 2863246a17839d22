"""MLA prefill by multi-head attention, as SGLang's `forward_mha.py` runs it.

Keys and values are expanded to the rank's own heads: a third of the multiplications of
absorbed attention (320 instead of 1088 a query and key for DeepSeek). SGLang expands, and
merges the pieces of a long prefix; the pieces, and what it asks of pool and attention, are
here: by local slots, with the latents of a piece gathered from all ranks.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

import torch

from sglang_dcp.layers.attention_calls import as_stored
from sglang_dcp.layers.latent_gather import (
    LatentPlan,
    cut_prefixes,
    gather_latents,
    plan_latents,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.adaptors.base import DcpAdaptor
    from sglang_dcp.layers.local_view import Shard

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A piece of a batch's prefixes, for all layers.

    `empty_rows` [tokens] bool: new tokens whose request has no position in it; None where
    each has some.
    """

    latents: LatentPlan
    empty_rows: Optional[torch.Tensor]


class MlaPrefill:
    """One backend's prefill by MHA; no query and no partial output leaves its rank.

    Parameters
    ----------
    adaptor : DcpAdaptor
    shard : Shard
    exchange : Exchange
        Over the KVP group.
    kv_pool
        SGLang's pool of this rank.
    """

    def __init__(
        self, adaptor: DcpAdaptor, shard: Shard, exchange: Exchange, kv_pool: Any
    ) -> None:
        self._adaptor = adaptor
        self._shard = shard
        self._exchange = exchange
        self._pool = kv_pool
        # By number; made by the first layer.
        self._pieces: dict[int, Piece] = {}
        self._told = False

    def init_forward_metadata(self) -> None:
        """Forget the pieces of the forward before."""
        self._pieces.clear()

    def cut(self, batch: ForwardBatch) -> None:
        """Cut the prefixes of an extend forward, once, in SGLang's stead.

        SGLang gives every request the same share of a piece, so that 64 requests with one
        long prefix among them come in many pieces that are nearly empty.
        """
        if batch.num_prefix_chunks is not None:
            return
        prefix = batch.extend_prefix_lens_cpu
        starts, lens = cut_prefixes(prefix, batch.get_max_chunk_capacity())
        if not self._told and self._shard.kvp_rank == 0:
            told = sum(prefix), len(lens)
            logger.info("DCP prefill by MHA gathers %d positions, pieces: %d", *told)
            self._told = True
        device = self._shard.local_table.device
        ends = torch.nn.functional.pad(lens.cumsum(1, dtype=torch.int32), (1, 0))
        batch.num_prefix_chunks = len(lens)
        batch.prefix_chunk_starts_cpu, batch.prefix_chunk_seq_lens_cpu = starts, lens
        batch.prefix_chunk_seq_lens = lens.to(device, non_blocking=True)
        batch.prefix_chunk_cu_seq_lens = ends.to(device, non_blocking=True)
        batch.prefix_chunk_max_seq_lens = lens.amax(1).tolist()
        # Logical slots, which nobody reads.
        batch.prefix_chunk_kv_indices = [None] * len(lens)

    @property
    def is_quantized(self) -> bool:
        """Whether the pool keeps less than it is given."""
        return bool(self._pool.dtype.itemsize == 1)

    def round_as_stored(self, *rows: torch.Tensor) -> None:
        """Latents and rotary keys of new tokens, in place.

        Where SGLang reads new tokens back from the pool: unrounded, they would be nearer
        to the truth and further from it.
        """
        for some in rows:
            some.copy_(as_stored(some, self._pool.dtype))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Own heads against new tokens, or against the piece of the prefix at hand.

        Returns [tokens, own heads, v_dim], with the LSE [tokens, own heads] float32 in
        natural logarithm where `batch.mha_return_lse`, as SGLang merges by it.
        """
        number = batch.prefix_chunk_idx if batch.attn_attend_prefix_cache else None
        q = q.view(q.shape[0], -1, layer.qk_head_dim)
        out, lse = self._adaptor.extend_mha(q, k, v, layer, batch, number)
        if number is not None:
            empty = self._pieces[number].empty_rows
            if empty is not None:
                out = out.masked_fill(empty[:, None, None], 0.0)
                lse = lse.masked_fill(empty[:, None], -math.inf)
        if not batch.mha_return_lse:
            return out
        if not self._adaptor.is_lse_base_on_e:
            lse = lse * math.log(2)
        return out, lse.contiguous()

    def prefix(
        self, layer: RadixAttention, dtype: torch.dtype, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the piece at hand, [positions, latent] and [positions, 1, rope].

        Raises
        ------
        RuntimeError
            Outside of a prefill that `cut` prepared (SGLang's one-shot form).
        """
        if batch.mha_one_shot or not batch.attn_attend_prefix_cache:
            raise RuntimeError("DCP gathers latents in pieces only, not in one shot")
        number = batch.prefix_chunk_idx
        if number not in self._pieces:
            self._pieces[number] = self._plan(number, batch)
        stored = self._pool.get_key_buffer(layer.layer_id)
        plan = self._pieces[number].latents
        rows = gather_latents(plan, stored, self._exchange).to(dtype)
        latent = self._pool.kv_lora_rank
        return rows[:, :latent], rows[:, None, latent:]

    def _plan(self, number: int, batch: ForwardBatch) -> Piece:
        lens = batch.prefix_chunk_seq_lens_cpu[number]
        starts = batch.prefix_chunk_starts_cpu[number]
        plan = plan_latents(self._shard, batch.req_pool_indices, starts, lens)
        if lens.all():
            return Piece(plan, None)
        without = batch.prefix_chunk_seq_lens[number] == 0
        tokens = sum(batch.extend_seq_lens_cpu)
        rows = without.repeat_interleave(batch.extend_seq_lens, output_size=tokens)
        return Piece(plan, rows)
