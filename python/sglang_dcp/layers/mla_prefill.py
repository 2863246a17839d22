"""MLA prefill by multi-head attention, as SGLang's `forward_mha.py` runs it.

Keys and values are expanded to the rank's own heads: a third of the multiplications of
absorbed attention (320 instead of 1088 a query and key for DeepSeek). SGLang expands, in
one shot or, for many positions, new tokens and then the prefix in pieces, and merges them;
what it asks of pool and attention is here: by local slots, with the latents gathered from
all ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from sglang_dcp.layers.adaptors.base import MhaKeys, cumulated
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
        # By number of the piece, None what is no piece; made by the first layer.
        self._keys: dict[Optional[int], tuple[MhaKeys, Optional[torch.Tensor]]] = {}
        self._plans: dict[Optional[int], LatentPlan] = {}
        self._told = False

    def init_forward_metadata(self) -> None:
        """Forget the plans of the forward before."""
        self._keys.clear()
        self._plans.clear()

    def prepare(self, batch: ForwardBatch) -> bool:
        """Prepare an extend forward with prefixes; whether for one shot, else in pieces.

        By SGLang's measure, `SGLANG_MAX_KV_CHUNK_CAPACITY`, from logical lengths.
        """
        positions = sum(_whole(batch))
        if positions > batch.get_max_chunk_capacity():
            self._cut(batch)
            return False
        # Logical slots, which nobody reads.
        batch.mha_one_shot_kv_indices = batch.req_pool_indices[:0]
        self._tell(positions, "in one shot")
        return True

    def _cut(self, batch: ForwardBatch) -> None:
        """Cut the prefixes, once, in SGLang's stead.

        SGLang gives every request the same share of a piece, so that 64 requests with one
        long prefix among them come in many pieces that are nearly empty.
        """
        if batch.num_prefix_chunks is not None:
            return
        prefix = batch.extend_prefix_lens_cpu
        starts, lens = cut_prefixes(prefix, batch.get_max_chunk_capacity())
        self._tell(sum(prefix), f"pieces: {len(lens)}")
        device = self._shard.table.device
        batch.num_prefix_chunks = len(lens)
        batch.prefix_chunk_starts_cpu, batch.prefix_chunk_seq_lens_cpu = starts, lens
        batch.prefix_chunk_cu_seq_lens = cumulated(lens).to(device, non_blocking=True)
        # Logical slots, which nobody reads.
        batch.prefix_chunk_kv_indices = [None] * len(lens)

    def _tell(self, positions: int, how: str) -> None:
        if not self._told and self._shard.kvp_rank == 0:
            logger.info("DCP prefill by MHA gathers %d positions, %s", positions, how)
        self._told = True

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Own heads against the keys at hand.

        These are all positions (one shot), new tokens, or a piece of the prefix. Returns
        [tokens, own heads, v_dim], with the LSE [tokens, own heads] float32 in natural
        logarithm where `batch.mha_return_lse`, as SGLang merges by it.
        """
        piece = batch.prefix_chunk_idx if batch.attn_attend_prefix_cache else None
        if piece not in self._keys:
            at_hand = _keys_at_hand(piece, batch)
            self._keys[piece] = at_hand, _empty_rows(at_hand, batch)
        keys, empty_rows = self._keys[piece]
        q = q.view(q.shape[0], -1, layer.qk_head_dim)
        out, lse = self._adaptor.extend_mha(q, k, v, layer, batch, keys)
        if empty_rows is not None:
            # There a kernel leaves anything.
            out = out.masked_fill(empty_rows[:, None, None], 0.0)
            lse = lse.masked_fill(empty_rows[:, None], -math.inf)
        if not batch.mha_return_lse:
            return out
        if not self._adaptor.is_lse_base_on_e:
            lse = lse * math.log(2)
        return out, lse.contiguous()

    def latents(
        self, layer: RadixAttention, dtype: torch.dtype, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [positions, latent] and rotary keys [positions, 1, rope], as stored.

        In one shot, of whole requests, whose new tokens are written by then; else of the
        piece of the prefix at hand.
        """
        piece = None if batch.mha_one_shot else batch.prefix_chunk_idx
        if piece not in self._plans:
            self._plans[piece] = self._plan(piece, batch)
        stored = self._pool.get_key_buffer(layer.layer_id)
        latent, rope = gather_latents(
            self._plans[piece], stored, self._pool.kv_lora_rank, self._exchange
        )
        return latent.to(dtype), rope.to(dtype).unsqueeze(1)

    def _plan(self, piece: Optional[int], batch: ForwardBatch) -> LatentPlan:
        if piece is None:
            lens = torch.tensor(_whole(batch))
            starts = torch.zeros_like(lens)
        else:
            starts = batch.prefix_chunk_starts_cpu[piece]
            lens = batch.prefix_chunk_seq_lens_cpu[piece]
        return plan_latents(self._shard, batch.req_pool_indices, starts, lens)


def _whole(batch: ForwardBatch) -> Sequence[int]:
    """Positions of each request, new ones included."""
    lens = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
    return [prefix + new for prefix, new in lens]


def _keys_at_hand(piece: Optional[int], batch: ForwardBatch) -> MhaKeys:
    if piece is not None:
        lens = batch.prefix_chunk_seq_lens_cpu[piece].tolist()
        return MhaKeys(piece, lens, batch.prefix_chunk_cu_seq_lens[piece])
    lens = _whole(batch) if batch.mha_one_shot else batch.extend_seq_lens_cpu
    counts = batch.seq_lens if batch.mha_one_shot else batch.extend_seq_lens
    return MhaKeys(None, lens, cumulated(counts))


def _empty_rows(keys: MhaKeys, batch: ForwardBatch) -> Optional[torch.Tensor]:
    """[tokens] bool, new tokens whose request has no key; None where each has some."""
    if all(keys.lens):
        return None
    tokens = sum(batch.extend_seq_lens_cpu)
    without = keys.ends.diff() == 0
    return without.repeat_interleave(batch.extend_seq_lens, output_size=tokens)
