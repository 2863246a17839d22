"""Backend for `--attention-backend triton`: SGLang's Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

from sglang_dcp.layers.backends.base import (
    Partial,
    PlannedBackend,
    RaggedKeys,
    kv_scales,
)
from sglang_dcp.layers.backends.capabilities import BackendCapabilities

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class TritonBackend(PlannedBackend):
    """SGLang's Triton backend plans; this class calls the kernels with their LSE.

    The LSE is in natural log. Decode leaves one LSE for each split of the keys, which
    are reduced here.
    """

    is_lse_base_on_e = True
    capabilities = BackendCapabilities()
    creator = "create_triton_backend"
    # `_GROUPED_BLOCK_H` of SGLang's kernel.
    head_tile = 16

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        plan = inner.get_num_kv_splits
        # SGLang divides by the shortest length, which is 0 if a shard is empty.
        inner.get_num_kv_splits = lambda splits, lens, *more: plan(
            splits, lens.clamp(min=1), *more
        )
        self._no_prefix: Optional[torch.Tensor] = None

    @property
    def planned_outputs(self) -> tuple[int, int]:
        inner = self._inner
        # SGLang 0.5.23 has them for another kernel, which DCP does not call.
        programs: int = getattr(inner, "lean_total_programs", 0)
        return inner.max_kv_splits, programs * getattr(inner, "lean_block_m", 0)

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        self._inner.init_forward_metadata(local)
        if batch.forward_mode.is_extend():
            self._no_prefix = torch.zeros_like(self._inner.forward_metadata.kv_indptr)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        from sglang_dcp.ops.split_lse import reduce_split_lse

        inner, plan = self._inner, self._inner.forward_metadata
        out = q.new_empty(q.shape[0], q.shape[1], layer.v_head_dim)
        keys, values = self._kv(layer)
        inner.decode_attention_fwd(
            q.contiguous(),
            keys,
            values,
            out,
            plan.kv_indptr,
            plan.kv_indices,
            plan.attn_logits,
            plan.attn_lse,
            plan.num_kv_splits,
            inner.max_kv_splits,
            layer.scaling,
            *_scales(layer, keys),
            use_pdl=inner.use_pdl,
            page_size=inner.page_size,
        )
        lse = reduce_split_lse(
            plan.attn_lse[: q.shape[0]], plan.kv_indptr, plan.num_kv_splits
        )
        return Partial(out, lse)

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        plan = self._inner.forward_metadata
        return self._extend(
            q,
            k.contiguous(),
            v.contiguous(),
            layer,
            self._kv(layer),
            kv_indptr=self._no_prefix,
            kv_indices=plan.kv_indices[:0],
            page_size=self._inner.page_size,
            is_causal=True,
            skip_prefix=True,
        )

    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        plan, (keys, values) = self._inner.forward_metadata, self._kv(layer)
        return self._extend(
            q,
            # The kernel reads the number of K/V heads, and so the GQA ratio, from new keys.
            q.new_empty(0, *keys.shape[1:]),
            q.new_empty(0, *values.shape[1:]),
            layer,
            (keys, values),
            kv_indptr=plan.kv_indptr,
            kv_indices=plan.kv_indices,
            page_size=self._inner.page_size,
            is_causal=False,
            skip_extend=True,
        )

    def extend_ragged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: RaggedKeys,
    ) -> Partial:
        """Attend to new tokens behind a prefix, whose rows the kernel takes for pages of one."""
        assert keys.rows is not None, "the kernel masks new tokens alone"
        return self._extend(
            q,
            k[keys.rows.new],
            v[keys.rows.new],
            layer,
            (k, v),
            kv_indptr=keys.rows.prefix_ends,
            kv_indices=keys.rows.prefix,
            page_size=1,
            is_causal=True,
        )

    def _extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        cache: tuple[torch.Tensor, torch.Tensor],
        *,
        kv_indptr: Optional[torch.Tensor],
        kv_indices: torch.Tensor,
        page_size: int,
        is_causal: bool,
        skip_prefix: bool = False,
        skip_extend: bool = False,
    ) -> Partial:
        inner, plan = self._inner, self._inner.forward_metadata
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        keys, values = cache
        inner.extend_attention_fwd(
            q.contiguous(),
            k,
            v,
            out,
            keys,
            values,
            plan.qo_indptr,
            kv_indptr,
            kv_indices,
            None,
            is_causal,
            None,
            plan.max_extend_len,
            *_scales(layer, keys),
            sm_scale=layer.scaling,
            lse_extend=lse,
            skip_prefix=skip_prefix,
            skip_extend=skip_extend,
            page_size=page_size,
        )
        return Partial(out, lse)


def _scales(layer: RadixAttention, keys: torch.Tensor) -> list[float]:
    return [1.0 if scale is None else scale for scale in kv_scales(layer, keys)]
