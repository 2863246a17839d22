"""The MLA kernels that our backends call, in plain torch, for tests without a GPU.

They take what the real ones take, and refuse what those would silently misread.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor

from sglang_dcp.ops.attention_torch import attention_with_lse_torch

NAN = float("nan")


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scaling: float, causal: bool
) -> Any:
    """Without keys: NaN, as a kernel may leave what it did not write."""
    if not len(keys):
        out = q.new_full((*q.shape[:2], values.shape[-1]), NAN)
        return out, torch.full(q.shape[:2], NAN)
    args = (q.double(), keys.double(), values.double())
    out, lse = attention_with_lse_torch(*args, scaling=scaling, causal=causal)
    return out.to(q.dtype), lse.float()


class FlashInferMla:
    """`BatchMLAPagedAttentionWrapper`: pages by plan, LSE in base 2."""

    PLAN = (
        "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv "
        "head_dim_kpe page_size causal sm_scale q_data_type kv_data_type"
    ).split()

    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []

    def plan(self, *args: Any) -> None:
        plan = dict(zip(self.PLAN, args, strict=True))
        for name in self.PLAN[:4]:
            assert plan[name].dtype == torch.int32, name
        tiles = plan["qo_indptr"].diff() * plan["num_heads"] / 128
        assert tiles.ceil().sum() <= 16384, "more work than a plan's buffers hold"
        assert not plan["causal"] or 128 % plan["num_heads"] == 0
        self.plans.append(plan)

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        return_lse: bool = False,
        *,
        ckv_scale: Optional[float] = None,
        kpe_scale: Optional[float] = None,
    ) -> tuple[Tensor, Tensor]:
        plan = self.plans[-1]
        assert return_lse and q_nope.shape[1] == plan["num_heads"]
        assert q_nope.dtype == q_pe.dtype == plan["q_data_type"]
        assert ckv_cache.dtype == kpe_cache.dtype == plan["kv_data_type"]
        assert ckv_cache.shape[1:] == (plan["page_size"], plan["head_dim_ckv"])
        quantized = ckv_cache.itemsize == 1
        assert (ckv_scale, kpe_scale) == ((1.0, 1.0) if quantized else (None, None))
        q, keys = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        parts = []
        ends = plan["qo_indptr"].tolist()
        for i, length in enumerate(plan["kv_len_arr"].tolist()):
            first = int(plan["kv_indptr"][i])
            pages = -(-length // plan["page_size"])
            where = plan["kv_indices"][first : first + pages].long()
            own = keys[where].flatten(0, 1)[:length, None]
            queries = q[ends[i] : ends[i + 1]]
            values = own[..., : plan["head_dim_ckv"]]
            how = plan["sm_scale"], plan["causal"]
            parts.append(attend(queries, own, values, *how))
        outs, lses = zip(*parts)
        return torch.cat(outs), torch.cat(lses) / torch.log(torch.tensor(2.0))


class FlashInferMha:
    """`BatchPrefillWithRaggedKVCacheWrapper`: K and V of every head, LSE in base 2."""

    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        *,
        head_dim_vo: int,
        causal: bool,
        q_data_type: torch.dtype,
    ) -> None:
        assert qo_indptr.device.type == kv_indptr.device.type == "cpu"
        assert num_qo_heads == num_kv_heads
        self.plans.append({name: value for name, value in locals().items()})

    def forward_return_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, sm_scale: float
    ) -> tuple[Tensor, Tensor]:
        plan = self.plans[-1]
        assert causal == plan["causal"] and q.dtype == plan["q_data_type"]
        assert q.shape[1:] == (plan["num_qo_heads"], plan["head_dim_qk"])
        assert v.shape[1:] == (plan["num_kv_heads"], plan["head_dim_vo"])
        queries = q.split(plan["qo_indptr"].diff().tolist())
        lens = plan["kv_indptr"].diff().tolist()
        rows = zip(queries, k.split(lens), v.split(lens))
        outs, lses = zip(*(attend(*qkv, sm_scale, causal) for qkv in rows))
        return torch.cat(outs), torch.cat(lses) / torch.log(torch.tensor(2.0))


class Fa3Mla:
    """SGLang's FlashAttention backend, as far as our backend uses it; natural log."""

    num_splits = 0

    def __init__(self, runner: Any) -> None:
        self.page_size = runner.page_size
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.forward_metadata: Any = None

    def init_forward_metadata(self, local: Any) -> None:
        rows = self.req_to_token[local.req_pool_indices, :: self.page_size]
        self.forward_metadata = SimpleNamespace(
            page_table=rows // self.page_size,
            cache_seqlens_int32=local.seq_lens.int(),
            cu_seqlens_q=torch.arange(len(rows) + 1, dtype=torch.int32),
            scheduler_metadata=None,
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pass

    def init_forward_metadata_out_graph(self, local: Any, in_capture: bool) -> None:
        self.init_forward_metadata(local)

    def flash_attn_varlen_func(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        return_softmax_lse: bool,
        qv: Optional[Tensor] = None,
    ) -> tuple[Tensor, Tensor]:
        assert return_softmax_lse
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        lens = cu_seqlens_k.diff().tolist()
        if qv is not None:
            q, k = torch.cat([qv, q], -1), torch.cat([v, k], -1)
        return self._each(
            q.split(cu_seqlens_q.diff().tolist()),
            k.split(lens),
            v.split(lens),
            softmax_scale,
            causal,
        )

    def flash_attn_with_kvcache(
        self,
        *,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        qv: Tensor,
        page_table: Tensor,
        cache_seqlens: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
        return_softmax_lse: bool,
        scheduler_metadata: Any = None,
    ) -> tuple[Tensor, Tensor]:
        assert return_softmax_lse and scheduler_metadata is None and not num_splits
        assert q.dtype == qv.dtype == k_cache.dtype == v_cache.dtype
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        # Of one query a request: it sees every key.
        assert not causal or max_seqlen_q == 1
        keys = torch.cat([v_cache, k_cache], -1)
        own = [
            keys[pages.long()].flatten(0, 1)[:length]
            for pages, length in zip(page_table, cache_seqlens.tolist())
        ]
        values = [rows[..., : v_cache.shape[-1]] for rows in own]
        queries = torch.cat([qv, q], -1).split(cu_seqlens_q.diff().tolist())
        return self._each(queries, own, values, softmax_scale, False)

    @staticmethod
    def _each(*parts: Any) -> tuple[Tensor, Tensor]:
        queries, keys, values, scaling, causal = parts
        rows = zip(queries, keys, values)
        outs, lses = zip(*(attend(*qkv, scaling, causal) for qkv in rows))
        return torch.cat(outs), torch.cat(lses).transpose(0, 1).contiguous()
