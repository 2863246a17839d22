"""The expanded MLA prefill, which SGLang's `forward_mha.py` runs as multi-head attention.

Keys and values are expanded to the rank's local heads. That takes a third of the
multiplications of absorbed attention: for DeepSeek 320 instead of 1088 for each query and
key. SGLang expands and merges. This module gives it the latents of all ranks, and runs
its attention calls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from sglang_dcp.layers.backends.attention_calls import first_rows, padded_rows
from sglang_dcp.layers.backends.base import Partial, RaggedKeys, cumulated
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.layers.mla.form import PrefillForm
from sglang_dcp.layers.mla.groups import Groups, gathered_prefixes
from sglang_dcp.layers.mla.in_place import AttendInPlace, PrefixInPlace
from sglang_dcp.layers.mla.latents import gather_latents
from sglang_dcp.layers.prefix.gather import (
    GatherPlan,
    empty_rows,
    plan_gather,
    split_into_chunks,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.backends.base import InnerBackend
    from sglang_dcp.layers.local_batch_types import Shard

logger = logging.getLogger(__name__)


class MlaPrefill:
    """The expanded MLA prefill of one backend.

    Only latents are gathered: no query and no partial output leaves its rank. In a prefill
    by group, this holds for the requests whose prefix is gathered.

    Parameters
    ----------
    backend : InnerBackend
    shard : Shard
    exchange : Exchange
        The exchange over the DCP group.
    kv_pool
        SGLang's pool of this rank.
    attend_in_place : AttendInPlace
        Attends to the prefixes that a prefill by group keeps in place.
    sizes : MlaSizes, optional
        Sizes by which a prefill chooses its form. A backend that never prefills has none.
    """

    def __init__(
        self,
        backend: InnerBackend,
        shard: Shard,
        exchange: Exchange,
        kv_pool: Any,
        attend_in_place: AttendInPlace,
        sizes: Optional[MlaSizes] = None,
    ) -> None:
        self._backend = backend
        self._shard = shard
        self._exchange = exchange
        self._pool = kv_pool
        # By index of the prefix chunk, None for other keys. The first layer fills them.
        self._keys: dict[Optional[int], tuple[RaggedKeys, Optional[torch.Tensor]]] = {}
        self._plans: dict[Optional[int], GatherPlan] = {}
        self.sizes = sizes
        self._form: Optional[PrefillForm] = None
        self._in_place = PrefixInPlace(backend, attend_in_place)
        self._local: Optional[ForwardBatch] = None
        self._logged: set[str] = set()

    def init_forward_metadata(self, local: ForwardBatch) -> None:
        """Drop the plans of the previous forward. `local` is the local batch of this one."""
        self._keys.clear()
        self._plans.clear()
        self._form = None
        self._in_place.init_forward_metadata()
        self._local = local

    def form(self, choose: Callable[[], PrefillForm]) -> PrefillForm:
        """Return the form of this forward. The first layer chooses it for all."""
        if self._form is None:
            self._form = choose()
        return self._form

    def prepare(self, batch: ForwardBatch, form: PrefillForm) -> None:
        """Set what the chosen form needs in SGLang's batch; a repeat changes nothing."""
        if form is PrefillForm.ONE_SHOT:
            # Logical slots, which nothing reads.
            batch.mha_one_shot_kv_indices = batch.req_pool_indices[:0]
            self._log_gather(sum(_whole(batch)), "in one shot")
        elif form is PrefillForm.PREFIX_CHUNKS and batch.num_prefix_chunks is None:
            self._split(batch, batch.extend_prefix_lens_cpu)

    def prepare_groups(
        self,
        batch: ForwardBatch,
        module: Any,
        share_out: Callable[[], Optional[Groups]],
    ) -> None:
        """Do the same for a prefill by group.

        Parameters
        ----------
        module
            SGLang's attention module of the layer that comes next.
        share_out : callable
            Makes the groups. The first layer calls it.
        """
        self._in_place.learn(module)
        if self._in_place.planned:
            return
        assert self._local is not None, "init_forward_metadata has not run"
        groups, prefix = share_out(), batch.extend_prefix_lens_cpu
        assert groups is not None, "the form was chosen without groups"
        gathered = gathered_prefixes(prefix, groups.stays)
        self._in_place.plan(self._local, groups.stays)
        self._split(batch, gathered)
        kept = sum(prefix) - sum(gathered)
        self._log_once("DCP prefill by group keeps %d positions in place", kept)

    def _split(self, batch: ForwardBatch, prefix: Sequence[int]) -> None:
        """Split prefixes, one of each request, into chunks, instead of SGLang.

        SGLang gives every request the same share of a chunk. With one long prefix among
        64 requests, its chunks would be nearly empty.
        """
        starts, lens = split_into_chunks(prefix, batch.get_max_chunk_capacity())
        if len(lens):
            self._log_gather(sum(prefix), f"prefix chunks: {len(lens)}")
        device = self._shard.table.device
        batch.num_prefix_chunks = len(lens)
        batch.prefix_chunk_starts_cpu, batch.prefix_chunk_seq_lens_cpu = starts, lens
        batch.prefix_chunk_cu_seq_lens = cumulated(lens).to(device, non_blocking=True)
        # Logical slots, which nothing reads.
        batch.prefix_chunk_kv_indices = [None] * len(lens)

    def _log_gather(self, positions: int, how: str) -> None:
        line = "DCP prefill by MHA gathers %d positions, %s"
        self._log_once(line, positions, how)

    def _log_once(self, line: str, *values: object) -> None:
        if line not in self._logged and self._shard.dcp_rank == 0:
            logger.info(line, *values)
        self._logged.add(line)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Attend with local heads to one set of keys, which the batch names.

        The set is all positions (one shot), the new tokens, or one prefix chunk.

        Parameters
        ----------
        q : Tensor [tokens, local heads x qk_dim]
        k, v : Tensor [keys, local heads, dim]
            Expanded keys and values.

        Returns
        -------
        out : Tensor [tokens, local heads, v_dim]
        lse : Tensor [tokens, local heads] float32
            Only if `batch.mha_return_lse`. Natural log, because SGLang merges by it.

        Rows with which SGLang pads the batch come last and are 0 in both.
        """
        chunk = batch.prefix_chunk_idx if batch.attn_attend_prefix_cache else None
        if chunk not in self._keys:
            keys = _keys_of(chunk, batch)
            self._keys[chunk] = keys, empty_rows(keys, batch)
        keys, empty = self._keys[chunk]
        rows, tokens = q.shape[0], sum(batch.extend_seq_lens_cpu)
        q = q[:tokens].view(tokens, -1, layer.qk_head_dim)
        # Keys of a prefix are those of requests. New tokens may be padded as queries are.
        k, v = first_rows(sum(keys.lens), k, v)
        out, lse = found = self._backend.extend_ragged(q, k, v, layer, batch, keys)
        if self._in_place.planned and chunk is None:
            self._in_place.merge_into(Partial(*found), q, layer.layer_id)
        if empty is not None:
            # A kernel may leave anything in these rows.
            out = out.masked_fill(empty[:, None, None], 0.0)
            lse = lse.masked_fill(empty[:, None], -math.inf)
        out = padded_rows(out, rows)
        if not batch.mha_return_lse:
            return out
        if not self._backend.is_lse_base_on_e:
            lse = lse * math.log(2)
        return out, padded_rows(lse.contiguous(), rows)

    def latents(
        self, layer: RadixAttention, dtype: torch.dtype, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather latents [positions, latent] and rotary keys [positions, 1, rope].

        In one shot they are those of whole requests, whose new tokens are written
        already. Otherwise they are those of the batch's prefix chunk. Values are as
        stored, cast to `dtype`. A collective over the DCP group.
        """
        chunk = None if batch.mha_one_shot else batch.prefix_chunk_idx
        if chunk not in self._plans:
            self._plans[chunk] = self._plan(chunk, batch)
        stored = self._pool.get_key_buffer(layer.layer_id)
        latent, rope = gather_latents(
            self._plans[chunk], stored, self._pool.kv_lora_rank, self._exchange
        )
        return latent.to(dtype), rope.to(dtype).unsqueeze(1)

    def _plan(self, chunk: Optional[int], batch: ForwardBatch) -> GatherPlan:
        if chunk is None:
            lens = torch.tensor(_whole(batch))
            starts = torch.zeros_like(lens)
        else:
            starts = batch.prefix_chunk_starts_cpu[chunk]
            lens = batch.prefix_chunk_seq_lens_cpu[chunk]
        return plan_gather(self._shard, batch.req_pool_indices, starts, lens)


def _whole(batch: ForwardBatch) -> Sequence[int]:
    """Count the positions of each request, new tokens included."""
    lens = zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
    return [prefix + new for prefix, new in lens]


def _keys_of(chunk: Optional[int], batch: ForwardBatch) -> RaggedKeys:
    if chunk is not None:
        lens = batch.prefix_chunk_seq_lens_cpu[chunk].tolist()
        return RaggedKeys(chunk, lens, batch.prefix_chunk_cu_seq_lens[chunk])
    lens = _whole(batch) if batch.mha_one_shot else batch.extend_seq_lens_cpu
    counts = batch.seq_lens if batch.mha_one_shot else batch.extend_seq_lens
    return RaggedKeys(None, lens, cumulated(counts))
