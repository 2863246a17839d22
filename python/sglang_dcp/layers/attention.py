"""The DCP-aware RadixAttention: any inner backend over a sequence-sharded KV cache.

A model calls it as it calls every SGLang backend: local query heads go in, outputs of the
same heads come out. In between, decode attends with all heads of the DCP group to the
rank's local keys. Then the group exchanges partial outputs.

Source: Helix, arXiv 2507.07120, section 2.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, get_context
from sglang_dcp.distributed.exchange import Exchange, create_exchange
from sglang_dcp.distributed.groups import get_dcp_group
from sglang_dcp.layers.backends.attention_calls import (
    check_call,
    first_rows,
    padded_rows,
    whole_rows,
)
from sglang_dcp.layers.backends.base import InnerBackend, Partial
from sglang_dcp.layers.chain_steps import ChainSteps
from sglang_dcp.layers.decode import DecodeAttention
from sglang_dcp.layers.decode_rows import as_one_chain
from sglang_dcp.layers.heads import is_mla
from sglang_dcp.layers.kv_pool import write_kv
from sglang_dcp.layers.kv_prefill import KvPrefill, kv_sizes_of
from sglang_dcp.layers.local_batch import LocalBatch, LocalBatchBuilder
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.layers.mla.prefill import MlaPrefill
from sglang_dcp.layers.mla.sizes import mla_sizes
from sglang_dcp.layers.prefix.kv_form import KvSizes
from sglang_dcp.layers.runner_view import RunnerView
from sglang_dcp.layers.short_prefill import ShortPrefill, short_prefill_of
from sglang_dcp.layers.workspace import (
    most_requests,
    tokens_per_request,
    workspace_spec,
)
from sglang_dcp.ops.chains import Chains
from sglang_dcp.ops.layout import kv_index_of_local_q
from sglang_dcp.ops.lse_merge import merge_two_states

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.layers.q_replication import QReplicas


class DcpAttentionBackend(AttentionBackend):
    """Wraps an inner backend that knows only its rank's pool.

    All ranks of a DCP group issue the same collectives in the same order. Logical
    lengths, which are equal on all of them, decide what to do.

    Parameters
    ----------
    backend : InnerBackend
        The inner backend.
    batches : LocalBatchBuilder
        It owns the local table that `backend` reads.
    exchange : Exchange
        The exchange over the DCP group.
    context : DcpContext
    req_to_token_pool, token_to_kv_pool
        SGLang's pools: the logical slot table, and this rank's K and V.
    q_replicas : QReplicas, optional
        Replicated Q projections, which decode uses.
    kv_sizes : KvSizes, optional
        Sizes by which a prefill over K/V heads chooses its form. If None, a prefix stays in
        place.
    width : int
        Query tokens of each request in a decode step, 1 without speculation. `backend`
        plans a decode step for as many times the heads.
    mla_sizes : MlaSizes, optional
        Sizes by which a prefill over latents chooses its form.

    Attributes
    ----------
    exchange : Exchange
    short_prefill : ShortPrefill, optional
        Tells which prefills SGLang's runner runs as decode steps. None if none is.
    chains : ChainSteps, optional
        Backends of decode steps whose rows are one chain. None if no prefill is one.
    """

    # Of the dummy prefills with which SGLang tunes kernels: as many requests at most as
    # its pool has rows. Triton's buffers end there, and FlashInfer's plans for latents
    # hold fewer than 16384.
    extend_dummy_seqs_capped_by_req_pool = True

    def __init__(
        self,
        backend: InnerBackend,
        batches: LocalBatchBuilder,
        exchange: Exchange,
        context: DcpContext,
        req_to_token_pool: Any,
        token_to_kv_pool: Any,
        q_replicas: Optional[QReplicas] = None,
        kv_sizes: Optional[KvSizes] = None,
        width: int = 1,
        mla_sizes: Optional[MlaSizes] = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self._width = width
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool = token_to_kv_pool
        self._batches = batches
        self.exchange = exchange
        self._dcp_size = context.config.dcp_size
        self._dcp_rank = context.dcp_rank
        self._q_replicas = q_replicas
        parts = (backend, batches.shard, exchange, token_to_kv_pool)
        self.decode = DecodeAttention(*parts, width)
        self.prefill = MlaPrefill(*parts, self._prefix_in_place, mla_sizes)
        self.kv_prefill = KvPrefill(*parts, kv_sizes)
        self.short_prefill: Optional[ShortPrefill] = None
        self.chains: Optional[ChainSteps] = None
        self._local: Optional[LocalBatch] = None

    @classmethod
    def for_runner(
        cls,
        backend: type[InnerBackend],
        runner: Any,
        beside: Optional[DcpAttentionBackend] = None,
        width: Optional[int] = None,
    ) -> DcpAttentionBackend:
        """Build for SGLang's `ModelRunner`, from the process's context and groups.

        Beside another backend of the same runner, both share local table and exchange, so
        they may not run at once. `width` is the number of query tokens of each request in
        a decode step. By default it is SGLang's, and 1 beside another backend.
        """
        context = get_context()
        config = context.config
        if beside is not None:
            batches, exchange = beside._batches.sibling(), beside.exchange
        else:
            batches = LocalBatchBuilder(
                runner.req_to_token_pool.req_to_token,
                *(config.dcp_size, context.dcp_rank, config.page_size),
            )
            exchange = create_exchange(
                config.comm_backend, get_dcp_group(), workspace_spec(runner, config)
            )
        if width is None:
            width = tokens_per_request(runner.server_args) if beside is None else 1
        requests = most_requests(runner, config)
        # The steps of a draft, and chains, never prefill.
        latents = beside is None and is_mla(runner.model_config)
        view = RunnerView(
            *(runner, batches.local_table, config, requests, width),
            head_tile=backend.head_tile,
        )
        built = cls(
            backend.from_runner(view),
            batches,
            exchange,
            context,
            runner.req_to_token_pool,
            runner.token_to_kv_pool,
            getattr(runner, "dcp_q_replicas", None),
            kv_sizes_of(runner, config) if beside is None else None,
            width,
            mla_sizes(runner, config) if latents else None,
        )
        if beside is None:
            built._add_short_prefills(backend, runner, config)
        return built

    def _add_short_prefills(
        self, backend: type[InnerBackend], runner: Any, config: DcpConfig
    ) -> None:
        """Let short prefills of a runner be decode steps, where that is served."""
        self.short_prefill = short = short_prefill_of(runner, config)
        if short is None or not short.rule.has_chains(runner.model_config.context_len):
            return
        self.chains = short.chains = ChainSteps(
            lambda width: self.for_runner(backend, runner, beside=self, width=width)
        )

    def _chain_of(self, rows: int) -> Optional[DcpAttentionBackend]:
        """Return the backend of a decode step whose rows are a chain, if they are one."""
        if self.chains is None or not self.chains.on:
            return None
        return self.chains.backend_of(rows)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Build the local batch and plan, once for all layers."""
        if forward_batch.forward_mode.is_idle():
            # No layer attends then, on any rank of this replica of DP attention.
            return
        if (chain := self._chain_of(forward_batch.batch_size)) is not None:
            return chain.init_forward_metadata(as_one_chain(forward_batch))
        batch, width = self.decode.step_of(forward_batch)
        # SGLang's projections of a prefill give a rank its own heads.
        replicated = batch.forward_mode.is_decode()
        self._local = self._batches.build(batch, width)
        self.prefill.init_forward_metadata(self._local.forward_batch)
        self.kv_prefill.init_forward_metadata(batch)
        self.backend.init_forward_metadata(batch, self._local.forward_batch)
        self._select_q_width(replicated=replicated)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured steps read, for `max_bs` requests."""
        self._batches.init_static(max_bs, self._width)
        # As the inner backend sees it, a verification has one query of each request.
        self.backend.init_cuda_graph_state(max_bs, max_bs)
        if self.chains is not None:
            self.chains.init_graphs(max_bs)

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Refresh what a captured decode step reads, outside the graph."""
        if (chain := self._chain_of(forward_batch.batch_size)) is not None:
            one = as_one_chain(forward_batch)
            return chain.init_forward_metadata_out_graph(one, in_capture)
        batch, width = self.decode.step_of(forward_batch)
        if not batch.forward_mode.is_decode():
            raise NotImplementedError(
                f"DCP captures decode only, not {forward_batch.forward_mode}"
            )
        self._local = self._batches.build_static(batch, width)
        self.backend.init_graph_metadata(self._local.forward_batch, in_capture)
        self._select_q_width(replicated=True)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the length of padding rows: one token, which DCP rank 0 owns.

        With speculation it is as many more as a request has query tokens. A draft's extension
        counts these, and a verification reads them as committed ones.
        """
        return 1 if self._width == 1 else 1 + self._width

    def update_verify_buffers_to_fill_after_draft(
        self, spec_info: Any, cuda_graph_bs: Optional[int]
    ) -> None:
        """Do nothing: the plan of a chain depends on no draft token."""

    def _select_q_width(self, *, replicated: bool) -> None:
        if self._q_replicas is not None:
            self._q_replicas.select(replicated=replicated)

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
        """Attend with the new token of each request: [tokens, local heads x v_dim].

        `q` is [tokens, local heads x qk_dim], or with replicated Q all heads of the DCP
        group. With `q_rope` and `k_rope`, `q` and `k` are the latent parts (absorbed MLA).
        In a verification there are `width` new tokens of each request. Safe in CUDA-graph
        capture. Raises NotImplementedError for a call that DCP does not support.
        """
        if (chain := self._chain_of(q.shape[0])) is not None:
            more = (save_kv_cache, q_rope, k_rope)
            return chain.forward_decode(q, k, v, layer, forward_batch, *more, **kwargs)
        check_call(layer, k, kwargs)
        local = self._current_batch()
        chains = local.width > 1
        if save_kv_cache and not chains:
            self._write(layer, local, k, v, k_rope)
        out, lse = self.exchange.reduce(
            *self.decode.attend(q, q_rope, layer, local),
            is_lse_base_on_e=self.backend.is_lse_base_on_e,
            empty_rows=local.empty_rows,
        )
        if chains:
            given = Chains(q, k, v, q_rope, k_rope)
            prefix = Partial(out, lse)
            out = self.decode.attend_chains(prefix, given, layer, local.width)
            # Written last, because a write with scales divides K and V in place.
            if save_kv_cache:
                self._write(layer, local, k, v, k_rope)
        return out.reshape(q.shape[0], -1)

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
        """Attend with new tokens to themselves and to the prefix on all ranks.

        Shapes and errors are those of `forward_decode`, with local heads in `q`. Tokens
        with which SGLang pads the batch come last, and their rows are 0. In an expanded MLA
        prefill it returns what `MlaPrefill.attend` returns. Never captured. A draft's
        extension was planned as a decode step, is one, and may be captured.
        """
        local = self._current_batch()
        rows, tokens = q.shape[0], len(local.empty_rows)
        if local.forward_batch.forward_mode.is_decode():
            q, k, v, q_rope, k_rope = first_rows(tokens, q, k, v, q_rope, k_rope)
            more = (save_kv_cache, q_rope, k_rope)
            out = self.forward_decode(q, k, v, layer, forward_batch, *more, **kwargs)
            return padded_rows(out, rows)
        check_call(layer, k, kwargs)
        if forward_batch.attn_attend_prefix_cache is not None:
            return self.prefill.attend(q, k, v, layer, forward_batch)
        q, k, v, q_rope, k_rope = first_rows(tokens, q, k, v, q_rope, k_rope)
        queries = whole_rows(layer, q, q_rope)
        keys = whole_rows(layer, k, k_rope)
        out = self._extend_in_parts(queries, keys, v, layer, local, forward_batch)
        # Written last, because a write with scales divides K and V in place.
        if save_kv_cache:
            self._write(layer, local, k, v, k_rope)
        return padded_rows(out.reshape(tokens, -1), rows)

    def _extend_in_parts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        local: LocalBatch,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """Attend to the new tokens, then to the prefix of all ranks, and merge the two.

        Over a gathered prefix one call does both.
        """
        v = v.view(*k.shape[:2], layer.v_head_dim)
        if local.has_cached_kv and self.kv_prefill.gathers:
            return self.kv_prefill.attend(q, k, v, layer, batch)
        sizes = (q.shape[1], k.shape[1], self._dcp_size, self._dcp_rank)
        kept = kv_index_of_local_q(*sizes, k.device)
        new = self.backend.extend_new_tokens(q, k[:, kept], v[:, kept], layer, batch)
        if not local.has_cached_kv:
            return new.out
        more = local.forward_batch, local.rows_to_mask
        prefix = self._prefix_in_place(q, layer, *more)
        base = self.backend.is_lse_base_on_e
        out, _ = merge_two_states(*new, *prefix, is_lse_base_on_e=base)
        return out.to(q.dtype)

    def _prefix_in_place(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
        empty_rows: Optional[torch.Tensor],
    ) -> Partial:
        """Attend with all heads of the DCP group to the rank's part of the prefix."""
        base = self.backend.is_lse_base_on_e
        # No name holds the gathered queries, so that the exchange may use their memory.
        partial = self.backend.extend_paged_prefix(
            self.exchange.gather_heads(q), layer, local
        )
        merged = self.exchange.reduce(
            *partial, is_lse_base_on_e=base, empty_rows=empty_rows
        )
        return Partial(*merged)

    def write_latents(
        self, layer: RadixAttention, latent: torch.Tensor, rope: torch.Tensor
    ) -> None:
        """Write the new tokens of an expanded MLA prefill to local slots.

        `latent` and `rope` are [tokens, 1, dim]. In this form SGLang writes latents before
        it calls the attention backend.
        """
        local = self._current_batch()
        latent, rope = first_rows(len(local.empty_rows), latent, rope)
        self._write(layer, local, latent, latent, rope)

    def _write(self, layer: RadixAttention, local: LocalBatch, *rows: Any) -> None:
        write_kv(self.token_to_kv_pool, layer, local.forward_batch.out_cache_loc, *rows)

    def _current_batch(self) -> LocalBatch:
        if self._local is None:
            raise RuntimeError("attention ran before init_forward_metadata")
        return self._local
