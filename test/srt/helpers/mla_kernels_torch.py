"""The MLA kernels that our backends call, in plain torch, for tests without a GPU.

They take what the real ones take, and refuse what those would silently misread.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, Optional

import pytest
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


class LatentPlans:
    """Plans for latents in the buffers of one object, and attention by the last of them."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def add(self, plan: dict[str, Any]) -> None:
        for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"):
            assert plan[name].dtype == torch.int32, name
        tiles = plan["qo_indptr"].diff() * plan["num_heads"] / 128
        assert tiles.ceil().sum() <= 16384, "more work than a plan's buffers hold"
        assert not plan["causal"] or 128 % plan["num_heads"] == 0
        self.made.append(plan)

    def attend(
        self, q: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], *scales: Any
    ) -> tuple[Tensor, Tensor]:
        """LSE in base 2. `scales`: ckv_scale and kpe_scale."""
        plan = self.made[-1]
        assert q[0].shape[1] == plan["num_heads"]
        assert q[0].dtype == q[1].dtype == plan["q_data_type"]
        assert keys[0].dtype == keys[1].dtype == plan["kv_data_type"]
        assert keys[0].shape[1:] == (plan["page_size"], plan["head_dim_ckv"])
        quantized = keys[0].itemsize == 1
        assert scales == ((1.0, 1.0) if quantized else (None, None))
        firsts = plan["kv_indptr"].tolist()
        ends, lens = plan["qo_indptr"].tolist(), plan["kv_len_arr"].tolist()
        how = plan["sm_scale"], plan["causal"]
        return attend_pages(q, keys, ends, firsts, lens, plan["kv_indices"], how)


def attend_pages(
    q: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    ends: list[int],
    firsts: list[int],
    lens: list[int],
    pages: Tensor,
    how: tuple[float, bool],
) -> tuple[Tensor, Tensor]:
    """Each request over its pages, from `pages[firsts[i]]` on; LSE in base 2."""
    queries, values = torch.cat(q, -1), torch.cat(keys, -1)
    parts = []
    for i, length in enumerate(lens):
        count = -(-length // values.shape[1])
        where = pages[firsts[i] : firsts[i] + count].long()
        own = values[where].flatten(0, 1)[:length, None]
        latent = own[..., : keys[0].shape[-1]]
        parts.append(attend(queries[ends[i] : ends[i + 1]], own, latent, *how))
    outs, lses = zip(*parts)
    return torch.cat(outs), torch.cat(lses) / torch.log(torch.tensor(2.0))


class FlashInferMla:
    """`BatchMLAPagedAttentionWrapper` of FlashInfer 0.6."""

    def __init__(self) -> None:
        self._plans = LatentPlans()

    @property
    def plans(self) -> list[dict[str, Any]]:
        return self._plans.made

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        self._plans.add({k: v for k, v in locals().items() if k != "self"})

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
        assert return_lse
        keys = ckv_cache, kpe_cache
        return self._plans.attend((q_nope, q_pe), keys, ckv_scale, kpe_scale)


class PlannedMla(LatentPlans):
    """What a plan of FlashInfer 0.7 leaves behind: plans in the same buffers."""

    def plan(
        self,
        *,
        output_dtype: torch.dtype,
        scale_mode: str,
        use_profiler: bool,
        **plan: Any,
    ) -> None:
        quantized = plan["kv_data_type"].itemsize == 1
        assert scale_mode == ("kv-per-tensor" if quantized else "default")
        assert output_dtype == plan["q_data_type"] and not use_profiler
        self.add(plan)


class FlashInferMlaContract:
    """The same wrapper of FlashInfer 0.7: plans promise what `run` takes and returns."""

    def __init__(self) -> None:
        self.contracts: list[dict[str, Any]] = []
        self._planned_backend: Any = None

    @property
    def plans(self) -> list[dict[str, Any]]:
        return self._planned_backend.made

    def plan(
        self,
        *,
        metadata: Any,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        query_layout: str = "packed",
        kv_cache_layout: str = "packed",
        lse_mode: str = "none",
    ) -> None:
        counts = -(-metadata.kv_len_arr // page_size)
        assert torch.equal(metadata.kv_indptr.diff(), counts), "pages are not in a row"
        self.contracts.append({k: v for k, v in locals().items() if k != "self"})
        # In other buffers each time: a captured graph would not see this plan.
        self._planned_backend = PlannedMla()

    def run(
        self,
        *,
        query: tuple[Tensor, Tensor],
        kv_cache: tuple[Tensor, Tensor],
        return_lse: bool = False,
        ckv_scale: Optional[float] = None,
        kpe_scale: Optional[float] = None,
    ) -> tuple[Tensor, Tensor]:
        assert type(query) is type(kv_cache) is tuple
        contract = self.contracts[-1]
        layouts = contract["query_layout"], contract["kv_cache_layout"]
        assert return_lse and contract["lse_mode"] == "base2"
        assert layouts == ("split", "split")
        assert query[0].dtype == contract["q_data_type"]
        assert kv_cache[0].dtype == contract["kv_data_type"]
        return self._planned_backend.attend(query, kv_cache, ckv_scale, kpe_scale)


class CompiledMla:
    """What FlashInfer compiles for latents: plans and `run` below its wrapper.

    As there, `run` knows of a plan what lies in the integer buffer, and the launch sizes
    in `info`. `runs` notes the arguments: a captured graph keeps these, whatever comes.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def plan(self, *args: Any) -> list[int]:
        _, ints, _, ends, firsts, lens, heads, _, _ = args
        assert ends.device.type == firsts.device.type == lens.device.type == "cpu"
        count = torch.tensor([len(lens)], dtype=torch.int32)
        rows = torch.cat([count, ends[: len(lens) + 1], firsts[: len(lens)], lens])
        ints.view(torch.int32)[: len(rows)] = rows
        return [heads]

    def run(self, *args: Any) -> None:
        self.runs.append(args)
        _, ints, info, q_nope, q_pe, ckv, kpe, pages, out, lse, mask, *more = args
        heads, page_size, sm_scale, base_on_e, *scales = more
        assert info == [heads] and not base_on_e and page_size == ckv.shape[1]
        # Per token ones, in 0.7.
        assert scales[:2] == [1.0, 1.0] and not any(scales[2:])
        plan = ints.view(torch.int32)
        count = int(plan[0])
        sizes = [1, count + 1, count, count]
        _, ends, firsts, lens = plan[: sum(sizes)].split(sizes)
        where = ends.tolist(), firsts.tolist(), lens.tolist()
        found = attend_pages(
            (q_nope, q_pe), (ckv, kpe), *where, pages, (sm_scale, mask == 1)
        )
        out.copy_(found[0])
        lse.copy_(found[1])


def installed_wrapper(compiled: CompiledMla, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed FlashInfer's own wrapper, on a CPU that it takes for a Hopper GPU.

    Its kernels are `compiled`. On a CPU there is no pinned memory.
    """
    import flashinfer.mla

    def empty(*size: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        return allocate(*size, **how)

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    stand_ins: dict[str, Any] = {
        "get_batch_mla_module": lambda *args: compiled,
        "get_compute_capability": lambda device: (9, 0),
        "_get_compute_capability": lambda device: (9, 0),
        "get_device_sm_count": lambda device: 132,
        "is_sm90a_supported": lambda device: True,
        "_get_fa_shared_memory_limits": lambda device: (233472, 232448),
    }
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("flashinfer.mla"):
            for name in stand_ins.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, stand_ins[name])
    scratch = torch.empty(16, dtype=torch.uint8)
    return flashinfer.mla.BatchMLAPagedAttentionWrapper(scratch, backend="fa3")


class FlashInferMha:
    """`BatchPrefillWithRaggedKVCacheWrapper`: K and V of rows; LSE in base 2."""

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
        assert num_qo_heads % num_kv_heads == 0
        self.plans.append({name: value for name, value in locals().items()})

    def forward_return_lse(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, sm_scale: float
    ) -> tuple[Tensor, Tensor]:
        plan = self.plans[-1]
        assert causal == plan["causal"] and q.dtype == plan["q_data_type"]
        assert q.shape[1:] == (plan["num_qo_heads"], plan["head_dim_qk"])
        assert k.shape[1:] == (plan["num_kv_heads"], plan["head_dim_qk"])
        assert v.shape[1:] == (plan["num_kv_heads"], plan["head_dim_vo"])
        queries = q.split(plan["qo_indptr"].diff().tolist())
        lens = plan["kv_indptr"].diff().tolist()
        rows = zip(queries, k.split(lens), v.split(lens))
        outs, lses = zip(*(attend(*qkv, sm_scale, causal) for qkv in rows))
        return torch.cat(outs), torch.cat(lses) / torch.log(torch.tensor(2.0))


class Fa3Plans:
    """How SGLang's FlashAttention backend plans, as far as our backends use it."""

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


class Fa3Mla(Fa3Plans):
    """SGLang's FlashAttention backend, as far as our backend uses it; natural log."""

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
        num_splits: int = 1,
    ) -> tuple[Tensor, Tensor]:
        assert return_softmax_lse
        # 0 would be the kernel's own choice, for which the memory has no bound.
        assert 1 <= num_splits <= 128
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
        assert return_softmax_lse and scheduler_metadata is None
        # 0 is the kernel's own choice.
        assert 0 <= num_splits <= 128
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
