"""Backend for `--attention-backend fa3`: FlashAttention-3, SGLang's default on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch

from sglang_dcp.layers.backends.base import (
    Partial,
    PlannedBackend,
    RaggedKeys,
    cumulated,
    local_pages,
)
from sglang_dcp.layers.backends.capabilities import BackendCapabilities
from sglang_dcp.layers.backends.fa3_splits import (
    FULL_TILES,
    Fa3Heads,
    prefix_splits,
    ragged_splits,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class ExtendPlan:
    """The plan of one extend forward, for all its layers."""

    cu_seqlens_q: torch.Tensor  # [requests + 1] int32
    max_seqlen_q: int
    page_table: torch.Tensor  # [requests, pages] int32, pages of the local prefix
    cache_seqlens: torch.Tensor  # [requests] int32, local prefix lengths


class Fa3Backend(PlannedBackend):
    """SGLang's FlashAttention backend plans decode; this class calls the kernels.

    FA3 returns the LSE in natural log as [heads, tokens]. With fp8 K/V all computation is
    in fp8, as in SGLang: queries are cast, and new tokens are rounded as they are stored.
    """

    is_lse_base_on_e = True
    capabilities = BackendCapabilities(head_dims=(64, 96, 128, 192, 256))
    splits_ragged_below = FULL_TILES
    creator = "create_flashattention_v3_backend"

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._extend: Optional[ExtendPlan] = None
        self._prefix: Optional[ExtendPlan] = None

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        if batch.forward_mode.is_extend():
            self._extend = self._prefix = self._plan_extend(batch, local)
        else:
            self._inner.init_forward_metadata(local)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self._paged(q, layer, **self.decode_plan())

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        plan = self.extend_plan()
        dtype = self._kv(layer)[0].dtype
        scaled = _descales(layer, dtype, len(plan.cache_seqlens), k.shape[1])
        if scaled:
            k, v = k / layer.k_scale, v / layer.v_scale
        returned = self._varlen(
            q.to(dtype).contiguous(),
            k.to(dtype).contiguous(),
            v.to(dtype).contiguous(),
            layer,
            None,
            **scaled,
        )
        return as_partial(returned, q.dtype)

    def extend_ragged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: RaggedKeys,
    ) -> Partial:
        longest = self.extend_plan().max_seqlen_q
        splits = self._splits(q, longest, k.shape[1], v.shape[2], keys)
        returned = self._varlen(q, k, v, layer, keys, num_splits=splits)
        return as_partial(returned, q.dtype)

    def plan_some_prefixes(self, local: ForwardBatch) -> None:
        self._prefix = self._plan_extend(local, local)

    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        plan = self._prefix
        assert plan is not None, "init_forward_metadata has not run"
        longest, kv_heads = plan.max_seqlen_q, layer.tp_k_head_num
        return self._paged(
            q,
            layer,
            page_table=plan.page_table,
            cache_seqlens=plan.cache_seqlens,
            cu_seqlens_q=plan.cu_seqlens_q,
            max_seqlen_q=longest,
            causal=False,
            num_splits=self._splits(q, longest, kv_heads, layer.v_head_dim),
        )

    def _splits(
        self,
        q: torch.Tensor,
        longest: int,
        kv_heads: int,
        v_dim: int,
        gathered: Optional[RaggedKeys] = None,
    ) -> int:
        """Return the `num_splits` of a call: over pages, or over keys that were `gathered`.

        `longest` is the largest number of query tokens of a request in this call.
        """
        if self._inner.num_splits:
            return int(self._inner.num_splits)
        tokens, heads, qk_dim = q.shape
        if gathered is not None and gathered.are_new(tokens):
            return 1
        sizes = Fa3Heads(heads, kv_heads, qk_dim, v_dim)
        queries = tokens, longest
        if gathered is None:
            return prefix_splits(sizes, *queries)
        return ragged_splits(sizes, *queries, max(gathered.lens))

    def _varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        keys: Optional[RaggedKeys],
        /,
        **more: Any,
    ) -> Any:
        """Call the kernel for rows that lie request after request.

        `keys` is None if the keys are the new tokens.
        """
        plan = self.extend_plan()
        ends, longest = plan.cu_seqlens_q, plan.max_seqlen_q
        if keys is not None:
            ends, longest = keys.ends, max(keys.lens)
        return self._inner.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_k=ends,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_k=longest,
            softmax_scale=layer.scaling,
            # With more keys than queries, FA3 takes the last of both as one token.
            causal=keys is None or keys.prefix_chunk is None,
            return_softmax_lse=True,
            **more,
        )

    def _paged(self, q: torch.Tensor, layer: RadixAttention, **plan: Any) -> Partial:
        keys, values = self._kv(layer)
        page = self._inner.page_size
        return as_partial(
            self._inner.flash_attn_with_kvcache(
                q=q.to(keys.dtype).contiguous(),
                k_cache=keys.view(-1, page, *keys.shape[1:]),
                v_cache=values.view(-1, page, *values.shape[1:]),
                softmax_scale=layer.scaling,
                return_softmax_lse=True,
                **_descales(
                    layer, keys.dtype, len(plan["cache_seqlens"]), keys.shape[1]
                ),
                **plan,
            ),
            q.dtype,
        )

    def _plan_extend(self, batch: ForwardBatch, local: ForwardBatch) -> ExtendPlan:
        inner = self._inner
        return ExtendPlan(
            cu_seqlens_q=cumulated(batch.extend_seq_lens),
            max_seqlen_q=max(batch.extend_seq_lens_cpu),
            page_table=local_pages(inner.req_to_token, local, inner.page_size),
            cache_seqlens=local.seq_lens.to(torch.int32),
        )

    def decode_plan(self) -> dict[str, Any]:
        """Return the kernel arguments of a decode step."""
        plan = self._inner.forward_metadata
        return dict(
            page_table=plan.page_table,
            cache_seqlens=plan.cache_seqlens_int32,
            cu_seqlens_q=plan.cu_seqlens_q,
            max_seqlen_q=1,
            scheduler_metadata=plan.scheduler_metadata,
            num_splits=self._inner.num_splits,
            # One query sees every key either way, but the plan was made for causal.
            causal=True,
        )

    def extend_plan(self) -> ExtendPlan:
        assert self._extend is not None, "init_forward_metadata has not run"
        return self._extend


def _descales(
    layer: RadixAttention, dtype: torch.dtype, requests: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """Return the scales of a quantized cache, [requests, kv heads] each, if it has any."""
    if layer.k_scale is None or dtype.itemsize > 1:
        return {}
    return {
        "k_descale": layer.k_scale.expand(requests, kv_heads),
        "v_descale": layer.v_scale.expand(requests, kv_heads),
    }


def as_partial(returned: Any, dtype: torch.dtype) -> Partial:
    """Convert an FA3 result: `out` in `dtype`, the LSE as [tokens, heads]."""
    out, lse, *_ = returned
    # For fp8 queries FA3 returns bfloat16, whatever the model's dtype.
    return Partial(out.to(dtype), lse.transpose(0, 1))
