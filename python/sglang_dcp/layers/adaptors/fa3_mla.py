"""Adaptor for `--attention-backend fa3` with latent attention (absorbed MLA).

Scores are the sum of two products: rotary queries with rotary keys, which FA3 takes as
Q and K, and latent queries with the latents, which it takes as QV and V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

from sglang_dcp.layers.adaptors.base import Partial, key_lens
from sglang_dcp.layers.adaptors.fa3 import Fa3Adaptor, as_partial, cumulated
from sglang_dcp.layers.attention_calls import split_latent

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Fa3MlaAdaptor(Fa3Adaptor):
    """`Fa3Adaptor` over one latent head; natural log.

    The cache must be in the queries' dtype: FA3 has no kernel for fp8 latents, and
    casting the pool would copy all of it in every layer.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        # Ends of the requests' keys, and the most of one; made by the first layer.
        self._whole: Optional[tuple[torch.Tensor, int]] = None

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        super().init_forward_metadata(batch, local)
        self._whole = None

    def decode_parts(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        return self._attend(latent, rope, layer, **self.decode_plan())

    def extend_new(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        plan = self.extend_plan()
        return self._contiguous(q, k, layer, plan.cu_seqlens_q, plan.max_seqlen_q)

    def extend_whole(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        if self._whole is None:
            lens = batch.extend_prefix_lens + batch.extend_seq_lens
            self._whole = cumulated(lens), max(key_lens(batch))
        return self._contiguous(q, k, layer, *self._whole).out

    def _contiguous(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layer: RadixAttention,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_k: int,
    ) -> Partial:
        plan = self.extend_plan()
        q_latent, q_rope = split_latent(q, layer)
        latents, k_rope = split_latent(k, layer)
        return as_partial(
            self._inner.flash_attn_varlen_func(
                q=q_rope,
                k=k_rope,
                v=latents,
                qv=q_latent,
                cu_seqlens_q=plan.cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=plan.max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                softmax_scale=layer.scaling,
                causal=True,
                return_softmax_lse=True,
            ),
            q.dtype,
        )

    def _paged(self, q: torch.Tensor, layer: RadixAttention, **plan: Any) -> Partial:
        return self._attend(*split_latent(q, layer), layer, **plan)

    def _attend(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        layer: RadixAttention,
        **plan: Any,
    ) -> Partial:
        inner = self._inner
        keys = inner.token_to_kv_pool.get_key_buffer(layer.layer_id)
        pages = keys.view(-1, inner.page_size, *keys.shape[1:])
        latents, k_rope = split_latent(pages, layer)
        return as_partial(
            inner.flash_attn_with_kvcache(
                q=q_rope,
                k_cache=k_rope,
                v_cache=latents,
                qv=q_latent,
                softmax_scale=layer.scaling,
                num_splits=inner.num_splits,
                return_softmax_lse=True,
                **plan,
            ),
            q_rope.dtype,
        )
