"""Backend for `--attention-backend flashinfer`: FlashInfer's wrappers over pages of one."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, Callable, Iterable, Optional

import torch

from sglang_dcp.layers.backends.base import (
    Partial,
    PlannedBackend,
    RaggedKeys,
    cumulated,
    kv_scales,
)
from sglang_dcp.layers.backends.capabilities import BackendCapabilities
from sglang_dcp.layers.backends.flashinfer_guard import PlanGuard
from sglang_dcp.releases.api import sglang_api

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class FlashInferBackend(PlannedBackend):
    """SGLang's FlashInfer backend plans decode; extend is planned here from host lengths.

    FlashInfer's LSE is in base 2, [tokens, heads]. SGLang hands it single slots as pages,
    whatever the page size. Plans never wait for the GPU (`PlanGuard`).

    Parameters
    ----------
    inner
        SGLang's backend.
    make_ragged : callable
        Makes a `BatchPrefillWithRaggedKVCacheWrapper`: one for new tokens and, when first
        needed, one for a gathered prefix, as all layers go through both in turn.
    """

    is_lse_base_on_e = False
    capabilities = BackendCapabilities(head_dims=(64, 128, 256))
    creator = "create_flashinfer_backend"

    def __init__(self, inner: Any, make_ragged: Callable[[], Any]) -> None:
        super().__init__(inner)
        self._make_ragged = make_ragged
        self._new_tokens = make_ragged()
        self._prefix = inner.prefill_wrappers_paged[0]
        self._gathered: Optional[Any] = None
        self._new_tokens_planned = self._prefix_planned = False
        self._guard = PlanGuard()

    @classmethod
    def from_runner(cls, runner: Any) -> FlashInferBackend:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        inner = cls._build_inner(runner)
        scratch = inner.workspace_buffer
        # SGLang's own may be a CUTLASS one, which takes no plan from the host.
        return cls(inner, lambda: BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD"))

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        # The first layer plans a prefill, since it knows the rank's local heads, and
        # whether the prefix is gathered.
        self._new_tokens_planned = self._prefix_planned = False
        with self._guard.before_forward():
            if not batch.forward_mode.is_extend():
                self._inner.init_forward_metadata(local)

    def init_graph_metadata(self, local: ForwardBatch, in_capture: bool) -> None:
        with self._guard.before_forward():
            super().init_graph_metadata(local, in_capture)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        [wrapper] = self._inner.forward_metadata.decode_wrappers
        return self._paged(wrapper, q, layer)

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        if not self._new_tokens_planned:
            lens = batch.extend_seq_lens_cpu
            with self._guard.amid_forward():
                _plan_ragged(self._new_tokens, q, k, v, (lens, lens), causal=True)
            self._new_tokens_planned = True
        return Partial(
            *self._new_tokens.forward_return_lse(
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                causal=True,
                sm_scale=layer.scaling,
            )
        )

    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        if not self._prefix_planned:
            with self._guard.amid_forward():
                self._plan_prefix(local, q.shape[1])
            self._prefix_planned = True
        return self._paged(self._prefix, q, layer, causal=False)

    def extend_ragged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: RaggedKeys,
    ) -> Partial:
        """Attend to new tokens behind their prefix, as planned in the first layer."""
        assert keys.prefix_chunk is None, "K/V heads have no prefix chunks"
        if self._gathered is None:
            self._gathered = self._make_ragged()
        if not self._prefix_planned:
            lens = batch.extend_seq_lens_cpu, keys.lens
            with self._guard.amid_forward():
                _plan_ragged(self._gathered, q, k, v, lens, causal=True)
            self._prefix_planned = True
        how = dict(causal=True, sm_scale=layer.scaling)
        return Partial(*self._gathered.forward_return_lse(q.contiguous(), k, v, **how))

    def _paged(
        self, wrapper: Any, q: torch.Tensor, layer: RadixAttention, **how: bool
    ) -> Partial:
        cache = self._kv(layer)
        k_scale, v_scale = kv_scales(layer, cache[0])
        return Partial(
            *wrapper.forward_return_lse(
                q.contiguous(),
                cache,
                sm_scale=layer.scaling,
                k_scale=k_scale,
                v_scale=v_scale,
                **how,
            )
        )

    def _plan_prefix(self, local: ForwardBatch, heads: int) -> None:
        sizes = self._inner.indices_updater_prefill
        lens = local.extend_prefix_lens_cpu
        self._prefix.plan(
            indptr(local.extend_seq_lens_cpu),
            indptr(lens),
            self._slots(local),
            torch.ones(len(lens), dtype=torch.int32),
            heads,
            sizes.num_kv_heads,
            sizes.head_dim,
            page_size=1,
            causal=False,
            q_data_type=sizes.q_data_type,
            kv_data_type=sizes.data_type,
        )

    def _slots(self, local: ForwardBatch) -> torch.Tensor:
        """[sum of local prefix lengths] int32, request after request."""
        table = self._inner.req_to_token_pool.req_to_token
        lens = local.seq_lens
        slots = table.new_empty(local.seq_lens_sum)
        sglang_api().kv_indices_kernel()[(len(lens),)](
            table,
            local.req_pool_indices,
            lens,
            cumulated(lens),
            None,
            slots,
            table.stride(0),
        )
        return slots


def _plan_ragged(
    wrapper: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: tuple[Iterable[int], Iterable[int]],
    *,
    causal: bool,
) -> None:
    """Plan for rows request after request; `lens` are those of queries and of keys."""
    wrapper.plan(
        *map(indptr, lens),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        head_dim_vo=v.shape[2],
        causal=causal,
        q_data_type=q.dtype,
    )


def indptr(lens: Iterable[int]) -> torch.Tensor:
    """Cumulated lengths from 0 on, int32 on the host: a plan that must not sync."""
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
