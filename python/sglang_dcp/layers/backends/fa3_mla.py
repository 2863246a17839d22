"""Backend for `--attention-backend fa3` with latent attention.

In the absorbed form a score is the sum of two products. FA3 takes rotary queries and
rotary keys as Q and K, and latent queries and latents as QV and V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_dcp.layers.backends.attention_calls import split_latent
from sglang_dcp.layers.backends.base import Partial
from sglang_dcp.layers.backends.capabilities import BackendCapabilities
from sglang_dcp.layers.backends.fa3 import Fa3Backend, as_partial

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Fa3MlaBackend(Fa3Backend):
    """`Fa3Backend` over one latent head. The LSE is in natural log.

    The cache must have the dtype of the queries. FA3 has no kernel for fp8 latents, and
    a cast would copy the whole pool in every layer.
    """

    capabilities = BackendCapabilities(
        head_dims=((512, 64),),
        fp8_with=(),
        no_fp8="has no kernel for fp8 latents, and casting would copy the whole pool in "
        "every layer",
    )

    def decode_parts(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        return self._attend(latent, rope, layer, **self.decode_plan())

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        q_latent, q_rope = split_latent(q, layer)
        latents, k_rope = split_latent(k, layer)
        parts = q_rope, k_rope, latents
        return as_partial(self._varlen(*parts, layer, None, qv=q_latent), q.dtype)

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
                return_softmax_lse=True,
                **plan,
            ),
            q_rope.dtype,
        )
