"""A prefill that gathers the K/V heads of its cached prefix.

Each rank receives the K and V that its local query heads need, from all ranks. So no query
and no partial output leaves its rank.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch

from sglang_dcp.layers.backends.base import NewBehindPrefix, RaggedKeys, cumulated
from sglang_dcp.layers.backends.registry import split_below
from sglang_dcp.layers.heads import is_mla, kv_head_counts
from sglang_dcp.layers.prefix import kv_form
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.gather import (
    GatherPlan,
    behind_prefix,
    plan_gather,
    spread_out,
)
from sglang_dcp.layers.prefix.kv_form import KvForm, KvSizes, choose_kv_form
from sglang_dcp.ops.kv_rows import order_kv_rows, pack_kv_rows
from sglang_dcp.ops.layout import (
    kv_heads_by_peer,
    kv_index_in_window,
    kv_index_of_local_q,
)
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.config import DcpConfig
    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.backends.base import InnerBackend
    from sglang_dcp.layers.local_batch_types import Shard

logger = logging.getLogger(__name__)


class KvPlan(NamedTuple):
    """The plan of one forward, for all its layers.

    `keys` are each request's prefix and its new tokens behind it. The order of `gather` has
    -1 where a new token belongs.
    """

    gather: GatherPlan
    keys: RaggedKeys
    rows: NewBehindPrefix


class LayersAhead(NamedTuple):
    """Gathered K and V of layers in a row, from layer `first` on.

    `keys` and `values` are [layers, keys, K/V heads, dim]. Rows of new tokens are empty
    until their layer runs.
    """

    first: int
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def last(self) -> int:
        return self.first + len(self.keys) - 1

    def holds(self, layer_id: int) -> bool:
        return self.first <= layer_id <= self.last


class KvPrefill:
    """The prefill over gathered K and V of one backend.

    Parameters
    ----------
    backend : InnerBackend
    shard : Shard
    exchange : Exchange
        The exchange over the DCP group.
    kv_pool
        SGLang's pool of this rank.
    sizes : KvSizes, optional
        None if a prefix always stays in place.
    """

    def __init__(
        self,
        backend: InnerBackend,
        shard: Shard,
        exchange: Exchange,
        kv_pool: Any,
        sizes: Optional[KvSizes],
    ) -> None:
        self._backend = backend
        self._shard = shard
        self._exchange = exchange
        self._pool = kv_pool
        self._sizes = sizes
        self._plan: Optional[KvPlan] = None
        self._ahead: Optional[LayersAhead] = None
        self._logged: set[str] = set()

    @property
    def gathers(self) -> bool:
        """Whether this forward gathers its prefix."""
        return self._plan is not None

    def init_forward_metadata(self, batch: ForwardBatch) -> None:
        """Choose and plan the form of a forward, once for all layers."""
        self._plan = self._ahead = None
        if self._form_of(batch) is KvForm.GATHERED:
            self._plan = self._planned(batch)
            line = "DCP prefill gathers K and V of %d positions"
            self._log_once(line, sum(batch.extend_prefix_lens_cpu))

    def _form_of(self, batch: ForwardBatch) -> KvForm:
        """Choose the form of a forward. One that is no prefill stays in place."""
        if self._sizes is None or not batch.forward_mode.is_extend():
            return KvForm.IN_PLACE
        return choose_kv_form(Requests.of(batch), self._sizes)

    def _planned(self, batch: ForwardBatch) -> KvPlan:
        prefix, new = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        lens = torch.tensor(prefix)
        where = batch.req_pool_indices, torch.zeros_like(lens), lens
        gather = plan_gather(self._shard, *where, own_first=True)
        rows = behind_prefix(prefix, new, gather.order.device)
        gather = gather._replace(order=spread_out(gather.order, rows))
        ends = cumulated(batch.extend_prefix_lens + batch.extend_seq_lens)
        keys = RaggedKeys(None, [p + n for p, n in zip(prefix, new)], ends, rows)
        return KvPlan(gather, keys, rows)

    def _log_once(self, line: str, count: int) -> None:
        if line not in self._logged and self._shard.dcp_rank == 0:
            logger.info(line, count)
        self._logged.add(line)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """Attend with new tokens to the whole prefix and, causally, to themselves.

        `q` is [tokens, local heads, qk_dim], `k` and `v` are [tokens, K/V heads, dim] with
        all heads of the rank. Returns [tokens, local heads, v_dim] in the query's dtype. In
        the first of some layers it is a collective over the DCP group. Never captured.
        """
        assert self._plan is not None, "this forward keeps its prefix in place"
        plan = self._plan
        ranks = self._shard.dcp_size, self._shard.dcp_rank
        kept = kv_index_of_local_q(q.shape[1], k.shape[1], *ranks, k.device)
        keys, values = self._of_layer(plan.gather, q.shape[1], layer.layer_id)
        keys.index_copy_(0, plan.rows.new, k[:, kept].to(keys.dtype))
        values.index_copy_(0, plan.rows.new, v[:, kept].to(values.dtype))
        out, _ = self._backend.extend_ragged(q, keys, values, layer, batch, plan.keys)
        return out.to(q.dtype)

    def _of_layer(
        self, plan: GatherPlan, own_q: int, layer_id: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V for local query heads: [keys, K/V heads, dim] each."""
        if self._ahead is None or not self._ahead.holds(layer_id):
            # Freed before the next layers are gathered.
            self._ahead = None
            self._ahead = self._gather(plan, own_q, layer_id)
        ahead = self._ahead
        if layer_id == ahead.last:
            self._ahead = None
        return ahead.keys[layer_id - ahead.first], ahead.values[layer_id - ahead.first]

    def _gather(self, plan: GatherPlan, own_q: int, first: int) -> LayersAhead:
        """Gather K and V of layer `first` and of as many after it as memory is meant for.

        A prefix is in the pool before its forward starts. Fewer, larger collectives and
        copies take less of the host.
        """
        layers = range(first, first + self._layers_at_once(plan, first))
        keys = [self._pool.get_key_buffer(layer) for layer in layers]
        values = [self._pool.get_value_buffer(layer) for layer in layers]
        ranks = self._shard.dcp_size, self._shard.dcp_rank
        sizes = (own_q, keys[0].shape[1], *ranks, keys[0].device)
        heads = kv_heads_by_peer(*sizes)
        dims = heads.shape[1], keys[0].shape[2], values[0].shape[2]
        # No name holds what was received, so that copies may use its memory.
        found = order_kv_rows(
            self._swapped(plan, keys, values, heads), plan.order, *dims
        )
        kept = kv_index_in_window(*sizes)
        return LayersAhead(first, *(part[:, :, kept] for part in found))

    def _layers_at_once(self, plan: GatherPlan, first: int) -> int:
        assert self._sizes is not None
        left = self._pool.start_layer + self._pool.layer_num - first
        return min(left, self._sizes.layers_at_once(len(plan.order)))

    def _swapped(
        self,
        plan: GatherPlan,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        heads: torch.Tensor,
    ) -> torch.Tensor:
        """Send each peer its heads: [ranks, layers, rows, K and V], own rows first."""
        (ranks, window), rows = heads.shape, len(plan.slots)
        width = window * (keys[0].shape[2] + values[0].shape[2])
        peers = ranks - 1
        # For peers, this rank's own, from peers. The last two are put in order as one.
        blocks = keys[0].new_empty(ranks + peers, len(keys), rows, width)
        pack_kv_rows(keys, values, plan.slots, heads, blocks[:ranks])
        self._exchange.swap_rows(
            blocks[:peers].flatten(1, 2), blocks[ranks:].flatten(1, 2)
        )
        return blocks[peers:]


def kv_sizes_of(runner: Any, config: DcpConfig) -> Optional[KvSizes]:
    """Return the sizes by which a runner's prefill chooses its form, or None.

    None means that a prefix always stays in place:

    - latents have a form of their own (`layers/mla`);
    - K and V in fp8 would be attended to with other scales and dtypes than in place, and
      FlashInfer's and Triton's calls for rows outside the pool take no fp8 here;
    - on a GPU, the backend or the release of SGLang was not compared (`kv_form.SERVED`).
    """
    model, stored = runner.model_config, runner.token_to_kv_pool.dtype
    if is_mla(model) or stored != runner.dtype or config.dcp_size == 1:
        return None
    args = sglang_api().resolved(runner.server_args)
    if runner.device != "cpu" and not _is_compared(args.attention_backend):
        return None
    return kv_sizes(runner, config)


def kv_sizes(runner: Any, config: DcpConfig) -> KvSizes:
    """Return the sizes of a runner's attention to K/V heads, gathered or not."""
    model, stored = runner.model_config, runner.token_to_kv_pool.dtype
    args = sglang_api().resolved(runner.server_args)
    return KvSizes(
        local_heads=model.num_attention_heads // config.tp_size,
        kv_heads=config.layout.kv_heads_per_rank(kv_head_counts(model)[0]),
        dcp_size=config.dcp_size,
        qk=model.head_dim,
        v=model.v_head_dim,
        itemsize=stored.itemsize,
        split_below=split_below(args, mla=False),
    )


def _is_compared(backend: str) -> bool:
    if not in_range(sglang_version(), kv_form.SERVED_SINCE, None):
        return False
    return backend in kv_form.SERVED
