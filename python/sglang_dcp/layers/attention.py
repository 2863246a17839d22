"""The DCP-aware RadixAttention: any inner backend over a sequence-sharded KV cache.

A model calls it as it calls every SGLang backend: its own query heads in, its own
output heads out. In between, decode attends with the whole head shard to the rank's
own keys and the KVP group exchanges partial outputs (Helix, arXiv 2507.07120, 2.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_dcp.layers.adaptors.base import DcpAdaptor, Partial
from sglang_dcp.layers.attention_calls import by_head, check_call, whole_rows
from sglang_dcp.layers.kv_pool import write_kv
from sglang_dcp.layers.layout import own_kv_index
from sglang_dcp.layers.local_view import LocalView, LocalViewBuilder
from sglang_dcp.layers.merge import merge_two_states
from sglang_dcp.layers.mla_prefill import MlaPrefill
from sglang_dcp.layers.workspace import workspace_spec

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.context import DcpContext
    from sglang_dcp.distributed.exchange import Exchange
    from sglang_dcp.layers.q_replication import QReplicas


class DcpAttentionBackend(AttentionBackend):
    """Wraps an inner backend that only knows its rank's own pool.

    All ranks of a KVP group issue the same collectives in the same order: what to do
    is decided from logical lengths, which are equal on all of them.

    Parameters
    ----------
    adaptor : DcpAdaptor
        The inner backend.
    views : LocalViewBuilder
        Owner of the local table that `adaptor` reads.
    exchange : Exchange
        Over the KVP group.
    context : DcpContext
    req_to_token_pool, token_to_kv_pool
        SGLang's pools: logical slot table, this rank's K and V.
    q_replicas : QReplicas, optional
        Wide Q projections to switch on in decode.
    """

    def __init__(
        self,
        adaptor: DcpAdaptor,
        views: LocalViewBuilder,
        exchange: Exchange,
        context: DcpContext,
        req_to_token_pool: Any,
        token_to_kv_pool: Any,
        q_replicas: Optional[QReplicas] = None,
    ) -> None:
        super().__init__()
        self.adaptor = adaptor
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool = token_to_kv_pool
        self._views = views
        self._exchange = exchange
        self._dcp_size = context.config.dcp_size
        self._kvp_rank = context.kvp_rank
        self._q_replicas = q_replicas
        self.prefill = MlaPrefill(adaptor, views.shard, exchange, token_to_kv_pool)
        self._view: Optional[LocalView] = None

    @classmethod
    def for_runner(cls, adaptor: type[DcpAdaptor], runner: Any) -> DcpAttentionBackend:
        """Build for SGLang's `ModelRunner` from the process's context and groups."""
        from sglang_dcp.context import get_context
        from sglang_dcp.distributed.exchange import create_exchange
        from sglang_dcp.distributed.groups import get_kvp_group
        from sglang_dcp.layers.local_runner import LocalRunner

        context = get_context()
        table = runner.req_to_token_pool.req_to_token
        config = context.config
        views = LocalViewBuilder(
            table, config.dcp_size, context.kvp_rank, config.page_size
        )
        return cls(
            adaptor.from_runner(LocalRunner(runner, views.local_table, config)),
            views,
            create_exchange(
                config.comm_backend, get_kvp_group(), workspace_spec(runner)
            ),
            context,
            runner.req_to_token_pool,
            runner.token_to_kv_pool,
            getattr(runner, "dcp_q_replicas", None),
        )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Localise the batch once for all layers."""
        if forward_batch.forward_mode.is_idle():
            return
        self._view = self._views.build(forward_batch)
        self.prefill.init_forward_metadata()
        self.adaptor.init_forward_metadata(forward_batch, self._view.batch)
        self._select_q_width(wide=forward_batch.forward_mode.is_decode())

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate the local view and the adaptor's state of captured decode steps."""
        self._views.init_static(max_bs)
        self.adaptor.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Refresh, outside the graph, what a captured decode step reads."""
        if not forward_batch.forward_mode.is_decode():
            raise NotImplementedError(
                f"DCP captures decode only, not {forward_batch.forward_mode}"
            )
        self._view = self._views.build_static(forward_batch)
        self.adaptor.init_graph_metadata(self._view.batch, in_capture)
        self._select_q_width(wide=True)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padding rows: one token, which lies on KVP rank 0."""
        return 1

    def _select_q_width(self, *, wide: bool) -> None:
        if self._q_replicas is not None:
            self._q_replicas.select(wide=wide)

    def support_triton(self) -> bool:
        """Whether SGLang may compute slots and positions with Triton kernels."""
        return torch.cuda.is_available()

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        q_rope: Optional[torch.Tensor] = None,
        k_rope: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One token a request: [tokens, own heads x qk_dim] -> [tokens, own heads x v_dim].

        `q` may already hold the heads of the whole attn_tp shard (replicated Q). With
        `q_rope` and `k_rope`, `q` and `k` are the latent parts (absorbed MLA).
        """
        check_call(layer, k, kwargs)
        view = self._current_view()
        if save_kv_cache:
            self._write(layer, view, k, v, k_rope)
        out = self._exchange.reduce(
            *self._decode(q, q_rope, layer, view.batch),
            is_lse_base_on_e=self.adaptor.is_lse_base_on_e,
            empty_rows=view.empty_rows,
        )
        return out.reshape(q.shape[0], -1)

    def _decode(
        self,
        q: torch.Tensor,
        q_rope: Optional[torch.Tensor],
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        """All heads of the shard against the rank's own keys."""
        if q_rope is not None:
            parts = by_head(layer, q, q_rope)
            if parts[0].shape[1] > layer.tp_q_head_num:
                # Replicated Q: nothing to gather, so nothing to put together either.
                return self.adaptor.decode_parts(*parts, layer, local)
        q = whole_rows(layer, q, q_rope)
        if q.shape[1] == layer.tp_q_head_num:
            q = self._exchange.gather_heads(q)
        return self.adaptor.decode(q, layer, local)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        q_rope: Optional[torch.Tensor] = None,
        k_rope: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """New tokens against themselves and the prefix, where it lies on all ranks.

        In MLA prefill by MHA, one of its calls (`MlaPrefill.attend`).
        """
        check_call(layer, k, kwargs)
        if forward_batch.attn_attend_prefix_cache is not None:
            return self.prefill.attend(q, k, v, layer, forward_batch)
        view = self._current_view()
        q = whole_rows(layer, q, q_rope)
        keys = whole_rows(layer, k, k_rope)
        out = self._extend_in_parts(q, keys, v, layer, view, forward_batch)
        # Only now: a write with scales divides K and V in place.
        if save_kv_cache:
            self._write(layer, view, k, v, k_rope)
        return out.reshape(q.shape[0], -1)

    def _extend_in_parts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        view: LocalView,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """New tokens among themselves, then against the sharded prefix, then merged."""
        v = v.view(*k.shape[:2], layer.v_head_dim)
        sizes = (q.shape[1], k.shape[1], self._dcp_size, self._kvp_rank)
        kept = own_kv_index(*sizes, k.device)
        new = self.adaptor.extend_new(q, k[:, kept], v[:, kept], layer, batch)
        if not view.reads_keys:
            return new.out
        base = self.adaptor.is_lse_base_on_e
        gathered = self._exchange.gather_heads(q)
        partial = self.adaptor.extend_prefix(gathered, layer, view.batch)
        prefix = self._exchange.reduce(
            *partial,
            is_lse_base_on_e=base,
            empty_rows=view.empty_rows,
            return_lse=True,
        )
        out, _ = merge_two_states(*new, *prefix, is_lse_base_on_e=base)
        return out.to(q.dtype)

    def write_latents(
        self, layer: RadixAttention, latent: torch.Tensor, rope: torch.Tensor
    ) -> None:
        """MLA's new tokens, [tokens, 1, dim] each, where the layer does not pass them."""
        self._write(layer, self._current_view(), latent, latent, rope)

    def _write(self, layer: RadixAttention, view: LocalView, *rows: Any) -> None:
        write_kv(self.token_to_kv_pool, layer, view.batch.out_cache_loc, *rows)

    def _current_view(self) -> LocalView:
        if self._view is None:
            raise RuntimeError("attention ran before init_forward_metadata")
        return self._view
