"""Adaptor for `--attention-backend torch_native`: the CPU path and the oracle on GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterable

import torch

from sglang_dcp.context import find_context
from sglang_dcp.layers.adaptors.base import DcpAdaptor, Partial
from sglang_dcp.layers.attention_ref import attention_with_lse_ref

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def mla_forward_method(attention: Any, batch: Any) -> Any:
    """Seam: registry entry `torch_native` of DeepSeek; absorbed MLA in every mode.

    Absorbed, K/V reach the pool through the attention backend and are read from there.
    On a GPU without DCP the choice is SGLang's own, that of an unregistered backend.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    if find_context() is None and torch.cuda.is_available():
        return AttentionBackendRegistry.get_handler("triton")(attention, batch)
    return AttnForwardMethod.MLA


class TorchNativeAdaptor(DcpAdaptor):
    """Plain torch, request by request; float32 inside.

    Parameters
    ----------
    local_table : Tensor [requests, local positions]
        Slots of this rank's pool, kept fresh by the wrapper.
    kv_pool
        SGLang's pool of this rank.
    """

    is_lse_base_on_e = True

    def __init__(self, local_table: torch.Tensor, kv_pool: Any) -> None:
        self._table = local_table
        self._pool = kv_pool

    @classmethod
    def from_runner(cls, runner: Any) -> TorchNativeAdaptor:
        return cls(runner.req_to_token_pool.req_to_token, runner.token_to_kv_pool)

    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self._paged(q, layer, local, [1] * local.batch_size)

    def extend_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        return self._paged(q, layer, local, local.extend_seq_lens_cpu)

    def extend_new(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        lens = list(batch.extend_seq_lens_cpu)
        return _join(
            attention_with_lse_ref(*qkv, scaling=layer.scaling, causal=True)
            for qkv in zip(q.split(lens), k.split(lens), v.split(lens))
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
            attention_with_lse_ref(
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
