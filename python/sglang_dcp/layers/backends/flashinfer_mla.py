"""Backend for `--attention-backend flashinfer` with latent attention.

Not built on SGLang's backend: that lists every slot of a request as a page of its own
and plans eager steps from device-side lengths, for which FlashInfer waits for the GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence

import torch

from sglang_dcp.layers.backends.attention_calls import as_stored, split_latent
from sglang_dcp.layers.backends.base import (
    InnerBackend,
    Partial,
    RaggedKeys,
    local_pages,
)
from sglang_dcp.layers.backends.capabilities import BackendCapabilities
from sglang_dcp.layers.backends.flashinfer_guard import PlanGuard
from sglang_dcp.layers.backends.flashinfer_plan import (
    LatentWrapper,
    check_decode_rows,
    check_int32_strides,
    heads_at_once,
    latent_wrapper,
    plan_mha,
    plan_pages,
    plan_rows,
    sizes_of,
)

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

_Parts = tuple[torch.Tensor, torch.Tensor]  # latent and rotary


class FlashInferMlaBackend(InnerBackend):
    """FlashInfer's MLA kernels over the rank's pages; LSE in base 2, [tokens, heads].

    All plans are made from host lengths, in time and memory proportional to this rank's
    shard. One wrapper serves decode, eager and captured at every batch size: a plan's
    buffers and launch sizes depend on the heads alone, so all graphs read the same ones.
    Plans never wait for the GPU (`PlanGuard`).

    Parameters
    ----------
    runner : RunnerView
    wrappers : three `BatchMLAPagedAttentionWrapper`
        Of decode, prefix and new tokens.
    make_mha : callable
        Makes a `BatchPrefillWithRaggedKVCacheWrapper`: one for keys that end with new
        tokens, and one for each prefix chunk, as all layers go through them in turn.
    """

    is_lse_base_on_e = False
    capabilities = BackendCapabilities(
        head_dims=((512, 64),),
        fp8_with=(torch.bfloat16,),
        no_fp8="has kernels for fp8 latents of bfloat16 models alone",
        # Where a tile of 128 rows ends amid a token, its causal bound is rounded down.
        local_heads_divide=128,
    )

    def __init__(
        self, runner: Any, wrappers: Sequence[Any], make_mha: Callable[[], Any]
    ) -> None:
        self._table = runner.req_to_token_pool.req_to_token
        self._pool = runner.token_to_kv_pool
        self._page_size = runner.page_size
        self._sizes = sizes_of(runner)
        self._decode, self._prefix, self._new_tokens = map(latent_wrapper, wrappers)
        self._prefix_heads = self._new_heads = 0
        self._make_mha = make_mha
        self._mha: dict[Optional[int], Any] = {}
        self._mha_planned: set[Optional[int]] = set()
        self._graph_pages: Optional[torch.Tensor] = None
        self._guard = PlanGuard()

    @classmethod
    def from_runner(cls, runner: Any) -> FlashInferMlaBackend:
        from flashinfer import (
            BatchMLAPagedAttentionWrapper,
            BatchPrefillWithRaggedKVCacheWrapper,
        )
        from flashinfer.utils import is_sm90a_supported
        from sglang.srt.environ import envs

        size = envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.get()
        scratch = _scratch(size, runner.device)
        # As "auto" in FlashInfer 0.6; in 0.7 that goes on to others if one refuses.
        kernels = "fa3" if is_sm90a_supported(scratch.device) else "fa2"
        return cls(
            runner,
            [BatchMLAPagedAttentionWrapper(scratch, backend=kernels) for _ in range(3)],
            lambda: BatchPrefillWithRaggedKVCacheWrapper(scratch, "NHD"),
        )

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        with self._guard.before_forward():
            if not batch.forward_mode.is_extend():
                self._plan_decode(local, self._pages(local))
        # Planned by the first layer, which knows what is needed and the local heads.
        self._new_heads = self._prefix_heads = 0
        self._mha_planned.clear()

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pages = -(-self._table.shape[1] // self._page_size)
        self._graph_pages = torch.zeros(
            max_bs, pages, dtype=torch.int32, device=self._table.device
        )

    def init_graph_metadata(self, local: ForwardBatch, in_capture: bool) -> None:
        assert self._graph_pages is not None, "init_cuda_graph_state has not run"
        with self._guard.before_forward():
            pages = self._pages(local)
            self._graph_pages[: len(pages), : pages.shape[1]] = pages
            self._plan_decode(local, self._graph_pages)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self.decode_parts(*split_latent(q, layer), layer, local)

    def decode_parts(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        return self._paged(self._decode, (latent, rope), layer)

    def plan_some_prefixes(self, local: ForwardBatch) -> None:
        """The first layer plans, by the local batch of its call."""
        self._prefix_heads = 0

    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        """A few heads at a time where a plan holds no more; they share the keys."""
        if not self._prefix_heads:
            self._plan_prefix(local, q.shape[1])
        parts = [
            self._paged(self._prefix, split_latent(some, layer), layer)
            for some in q.split(self._prefix_heads, dim=1)
        ]
        return _side_by_side(parts)

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        """Keys request after request in the model's dtype, rounded as they are stored.

        SGLang reads them back from the pool: unrounded, they would be further from it.
        """
        k = as_stored(k, self._pool.dtype)
        if not self._new_heads:
            queries = batch.extend_seq_lens_cpu
            heads = self._new_heads = heads_at_once(queries, q.shape[1])
            with self._guard.amid_forward():
                plan_rows(self._new_tokens, self._sizes, heads, queries)
        parts = [
            self._run(self._new_tokens, split_latent(some, layer), k, layer)
            for some in q.split(self._new_heads, dim=1)
        ]
        return _side_by_side(parts)

    def extend_ragged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: RaggedKeys,
    ) -> Partial:
        chunk, causal = keys.prefix_chunk, keys.prefix_chunk is None
        if chunk not in self._mha:
            self._mha[chunk] = self._make_mha()
        wrapper = self._mha[chunk]
        if chunk not in self._mha_planned:
            lens = batch.extend_seq_lens_cpu, keys.lens
            sizes = q.shape[1], q.shape[2], v.shape[2]
            with self._guard.amid_forward():
                plan_mha(wrapper, *lens, sizes, q.dtype, causal=causal)
            self._mha_planned.add(chunk)
        return Partial(
            *wrapper.forward_return_lse(q, k, v, causal=causal, sm_scale=layer.scaling)
        )

    def _paged(
        self, wrapper: LatentWrapper, q: _Parts, layer: RadixAttention
    ) -> Partial:
        keys = self._pool.get_key_buffer(layer.layer_id)
        pages = keys.view(-1, self._page_size, keys.shape[-1])
        # SGLang stores latents in fp8 as they are, whatever scales a checkpoint has.
        quantized = keys.itemsize == 1
        scales = {"ckv_scale": 1.0, "kpe_scale": 1.0} if quantized else {}
        return self._run(wrapper, q, pages, layer, **scales)

    def _run(
        self,
        wrapper: LatentWrapper,
        q: _Parts,
        keys: torch.Tensor,
        layer: RadixAttention,
        **scales: float,
    ) -> Partial:
        if abs(layer.scaling / self._sizes.scaling - 1) > 1e-6:
            raise RuntimeError(
                f"layer {layer.layer_id} scales by {layer.scaling}, the plan by "
                f"{self._sizes.scaling}"
            )
        for part in q:
            check_int32_strides(part)
        return Partial(*wrapper.run(q, split_latent(keys, layer), **scales))

    def _pages(self, local: ForwardBatch) -> torch.Tensor:
        return local_pages(self._table, local, self._page_size)

    def _plan_decode(self, local: ForwardBatch, pages: torch.Tensor) -> None:
        check_decode_rows(local.batch_size, self._sizes.heads)
        queries = [1] * local.batch_size
        lens = local.seq_lens_cpu
        plan_pages(self._decode, self._sizes, self._sizes.heads, queries, lens, pages)

    def _plan_prefix(self, local: ForwardBatch, heads: int) -> None:
        queries = local.extend_seq_lens_cpu
        heads = self._prefix_heads = heads_at_once(queries, heads)
        pages = self._pages(local)
        where = queries, local.seq_lens_cpu, pages
        with self._guard.amid_forward():
            plan_pages(self._prefix, self._sizes, heads, *where)


@functools.cache
def _scratch(size: int, device: str) -> torch.Tensor:
    """Return `size` bytes that all kernels of a process share, one after the other."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def _side_by_side(parts: Sequence[Partial]) -> Partial:
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts)
    return Partial(torch.cat(outs, dim=1), torch.cat(lses, dim=1))
