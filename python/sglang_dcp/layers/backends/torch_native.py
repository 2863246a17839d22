"""Backend for `--attention-backend torch_native`: the CPU path, and a reference on GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable

import torch

from sglang_dcp.layers.backends.base import InnerBackend, Partial, RaggedKeys
from sglang_dcp.layers.backends.capabilities import BackendCapabilities
from sglang_dcp.ops.attention_torch import attention_with_lse_torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class TorchNativeBackend(InnerBackend):
    """Plain torch, request by request. It computes in float32; the LSE is in natural log.

    Parameters
    ----------
    local_table : Tensor [requests, local positions]
        Slots of this rank's pool. `LocalBatchBuilder` refreshes it.
    kv_pool
        SGLang's pool of this rank.
    """

    is_lse_base_on_e = True
    capabilities = BackendCapabilities(cpu=True, dtypes=(), fp8_with=())

    def __init__(self, local_table: torch.Tensor, kv_pool: Any) -> None:
        self._table = local_table
        self._pool = kv_pool

    @classmethod
    def from_runner(cls, runner: Any) -> TorchNativeBackend:
        return cls(runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self._paged(q, layer, local, [1] * local.batch_size)

    def plan_some_prefixes(self, local: ForwardBatch) -> None:
        """Nothing is planned."""

    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self._paged(q, layer, local, local.extend_seq_lens_cpu)

    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        lens = list(batch.extend_seq_lens_cpu)
        return _join(
            attention_with_lse_torch(*qkv, scaling=layer.scaling, causal=True)
            for qkv in zip(q.split(lens), k.split(lens), v.split(lens))
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
        queries, lens = list(batch.extend_seq_lens_cpu), list(keys.lens)
        causal = keys.prefix_chunk is None
        return _join(
            attention_with_lse_torch(*qkv, scaling=layer.scaling, causal=causal)
            for qkv in zip(q.split(queries), k.split(lens), v.split(lens))
        )

    def _paged(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
        query_lens: Iterable[int],
    ) -> Partial:
        keys = self._pool.get_key_buffer(layer.layer_id)
        values = self._pool.get_value_buffer(layer.layer_id)
        requests = zip(
            q.split(list(query_lens)),
            local.req_pool_indices.tolist(),
            local.seq_lens_cpu.tolist(),
        )
        return _join(
            attention_with_lse_torch(
                queries,
                keys[self._table[row, :length].long()],
                values[self._table[row, :length].long()],
                scaling=layer.scaling,
                causal=False,
            )
            for queries, row, length in requests
        )


def _join(parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Partial:
    out, lse = zip(*parts)
    return Partial(torch.cat(out), torch.cat(lse))
