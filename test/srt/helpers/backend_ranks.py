"""One rank's attention backend at work on a stand-in for SGLang's `ModelRunner`.

What `test_backends*.py` share with `backend_groups.py`, which runs all ranks of a DCP
group in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor

from helpers.attention_oracle import Shape
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.exchange.base import mask_empty_rows
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.releases.installed import in_range, sglang_version

FP8 = torch.float8_e4m3fn
# What slots hold that no one has written: finite, as a used pool's, but far off.
GARBAGE = 300.0


@dataclass(frozen=True)
class Case:
    """One backend at work; `scale` is what a checkpoint's fp8 K/V were divided by.

    `idle_scale` is one that the layer has and the cache, in the model's dtype, has not.
    If it `gathers`, every prefill over a prefix gathers K and V. A decode step brings
    `width` query tokens of each request.
    """

    backend: str
    shape: Shape = Shape(8, 2, 128, 128)
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: Optional[torch.dtype] = None
    scale: Optional[float] = None
    idle_scale: Optional[float] = None
    dcp_size: int = 2
    page_size: int = 1
    device: str = "cuda"
    max_len: int = 1500
    gathers: bool = False
    width: int = 1

    @property
    def arguments(self) -> dict[str, str]:
        """What a user would start the server with."""
        kv_dtype = "auto" if self.kv_dtype is None else "fp8_e4m3"
        return {"attention_backend": self.backend, "kv_cache_dtype": kv_dtype}


class StashExchange:
    """Notes a rank's partial result; answers with `merged` once it is known."""

    def __init__(self, own: slice) -> None:
        self._own = own
        self.all_heads: Optional[Tensor] = None
        self.partial: tuple[Tensor, Tensor]
        self.merged: Optional[tuple[Tensor, Tensor]] = None
        self.swapped: Optional[Tensor] = None
        self.incoming: Optional[Tensor] = None

    def gather_heads(self, q: Tensor) -> Tensor:
        assert self.all_heads is not None
        return self.all_heads

    def swap_rows(self, sent: Tensor, received: Tensor) -> None:
        """What peers send, once it is known."""
        self.swapped = sent.clone()
        received.copy_(sent if self.incoming is None else self.incoming)

    def reduce(self, out: Tensor, lse: Tensor, **kwargs: Any) -> Any:
        lse = mask_empty_rows(lse, kwargs["empty_rows"])
        self.partial = out, lse
        own = out[:, self._own], lse[:, self._own]
        # A captured step has padding rows beside those of its requests.
        return own if self.merged is None else tuple(map(_head_of, self.merged, own))


def _head_of(rows: Tensor, like: Tensor) -> Tensor:
    return rows[: len(like)]


class Rank:
    """One rank's pool and backend, built on a stand-in for SGLang's `ModelRunner`."""

    def __init__(
        self,
        case: Case,
        dcp_rank: int,
        table: Tensor,
        slots: int,
        make_backend: Callable[[Case, Any], Any],
    ) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        from sglang_dcp.context import DcpContext
        from sglang_dcp.layers.attention import DcpAttentionBackend
        from sglang_dcp.layers.backends.registry import backend_class
        from sglang_dcp.layers.chain_steps import ChainSteps
        from sglang_dcp.layers.local_batch import LocalBatchBuilder
        from sglang_dcp.layers.prefix.kv_form import KvSizes
        from sglang_dcp.layers.runner_view import RunnerView

        self.shape = shape = case.shape
        self.local_heads = shape.q_heads // case.dcp_size
        first = dcp_rank * self.local_heads
        self.own = slice(first, first + self.local_heads)
        self.pool = make_pool(case, slots)
        self.exchange = StashExchange(self.own)
        config = DcpConfig(Layout(case.dcp_size, 1), page_size=case.page_size)
        kind = backend_class(case.backend, shape.latent)
        heads = self.local_heads, shape.kv_heads, case.dcp_size
        dims = shape.qk_dim, shape.v_dim, case.dtype.itemsize

        def build(views: LocalBatchBuilder, width: int) -> DcpAttentionBackend:
            runner = RunnerView(
                make_runner(case, table, self.pool),
                *(views.local_table, config, len(table), width),
                head_tile=kind.head_tile,
            )
            return DcpAttentionBackend(
                make_backend(case, runner),
                views,
                self.exchange,  # type: ignore[arg-type]
                DcpContext(config, dcp_rank),
                None,
                self.pool,
                kv_sizes=KvSizes(*heads, *dims) if case.gathers else None,
                width=width,
            )

        views = LocalBatchBuilder(table, case.dcp_size, dcp_rank, case.page_size)
        self.backend = build(views, case.width)
        self.chains = ChainSteps(lambda width: build(views.sibling(), width))
        scaling = shape.qk_dim**-0.5
        self.layer = RadixAttention(
            self.local_heads,
            shape.qk_dim,
            scaling,
            shape.kv_heads,
            0,
            v_head_dim=shape.v_dim,
        )
        if (scale := case.scale or case.idle_scale) is not None:
            on_device = torch.tensor(scale, device=case.device)
            self.layer.k_scale = self.layer.v_scale = on_device
            self.layer.k_scale_float = self.layer.v_scale_float = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> Tensor:
        """As the model calls: MLA's rows come in two parts."""
        if not self.shape.latent:
            return self.backend.forward(q, k, v, self.layer, batch)
        at = self.shape.v_dim
        # The absorbed part is what a batched product over heads leaves.
        latent = q[..., :at].transpose(0, 1).contiguous().transpose(0, 1)
        rope = dict(q_rope=q[..., at:], k_rope=k[..., at:])
        k = k[..., :at].contiguous()
        return self.backend.forward(latent, k, k, self.layer, batch, **rope)


def real_backend(case: Case, runner: Any) -> Any:
    """The one that a server would use."""
    from sglang_dcp.layers.backends.registry import backend_class

    return backend_class(case.backend, case.shape.latent).from_runner(runner)


class LatentPool:
    """Mixed into SGLang's MLA pool on a CPU, where its kernel that writes does not run."""

    def set_mla_kv_buffer(self, layer: Any, loc: Tensor, *parts: Tensor) -> None:
        rows = torch.cat(parts, dim=-1).view(len(loc), 1, -1)
        self.get_key_buffer(layer.layer_id)[loc] = rows.to(self.dtype)  # type: ignore


def make_pool(case: Case, slots: int) -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    shape, stored = case.shape, case.kv_dtype or case.dtype
    sizes: tuple[Any, ...] = (slots, case.page_size, stored)
    rest = (1, case.device, False)
    pool: Any
    if shape.latent:
        bases = (LatentPool, MLATokenToKVPool)[case.device != "cpu" :]
        kind = type("Pool", bases, {})
        pool = kind(*sizes, shape.v_dim, shape.qk_dim - shape.v_dim, *rest)
    else:
        pool = MHATokenToKVPool(*sizes, shape.kv_heads, shape.qk_dim, *rest)
    for buffer in pool.get_kv_buffer(0):
        buffer.copy_(torch.full_like(buffer, GARBAGE, dtype=torch.float32))
    return pool


def stored_rows(pool: Any) -> list[Tensor]:
    """The tensors that hold K and V of a layer."""
    if hasattr(pool, "kv_buffer"):
        return [pool.kv_buffer[0]]
    return [pool.k_buffer[0], pool.v_buffer[0]]


def make_runner(case: Case, table: Tensor, pool: Any) -> Any:
    """What SGLang's attention backends read of a `ModelRunner`."""
    from sglang.srt.runtime_context import get_server_args

    dcp = case.dcp_size
    runner = SimpleNamespace(
        attention_chunk_size=None,
        decode_attention_backend_str=case.backend,
        # Without speculation, decode has one token of each request.
        decode_num_tokens_per_req=lambda: 1,
        device=case.device,
        dtype=case.dtype,
        gpu_id=0,
        init_new_workspace=False,
        is_draft_worker=False,
        kv_cache_dtype=case.kv_dtype or case.dtype,
        kv_cache_dtype_str=case.arguments["kv_cache_dtype"],
        model_config=make_model(case),
        page_size=case.page_size * dcp,
        prefill_attention_backend_str=case.backend,
        ps=SimpleNamespace(tp_size=dcp, attn_cp_size=1),
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=len(table)),
        server_args=get_server_args(),
        sliding_window_size=None,
        spec_algorithm=None,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        use_mla_backend=case.shape.latent,
    )
    if in_range(sglang_version(), "0.5.19", None):
        runner.kv_index_translator = logical_translator(runner)
    return runner


def make_model(case: Case) -> Any:
    """What they read of a `ModelConfig`, as our hooks leave it: K/V heads times ranks."""
    from sglang.srt.configs.model_config import AttentionArch

    shape = case.shape
    dcp = case.dcp_size
    seen_kv_heads = shape.kv_heads * dcp
    text = SimpleNamespace(num_attention_heads=shape.q_heads, dcp_kv_head_scale=dcp)
    return SimpleNamespace(
        attention_arch=AttentionArch.MLA if shape.latent else AttentionArch.MHA,
        context_len=case.max_len,
        get_max_num_attention_heads=lambda: shape.q_heads,
        get_total_num_kv_heads=lambda: seen_kv_heads,
        get_num_kv_heads=lambda tp_size, own_dcp_size=1: seen_kv_heads // tp_size,
        head_dim=shape.qk_dim,
        hf_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"], get_text_config=lambda: text
        ),
        hf_text_config=text,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        is_multimodal=False,
        kv_lora_rank=shape.v_dim,
        linear_attn_registry_result=None,
        num_attention_heads=shape.q_heads,
        # Of the expanded heads, which these backends plan for and our tests do not use.
        qk_nope_head_dim=128,
        qk_rope_head_dim=shape.qk_dim - shape.v_dim,
        scaling=shape.qk_dim**-0.5,
        swa_v_head_dim=shape.v_dim,
        v_head_dim=shape.v_dim,
    )


def logical_translator(runner: Any) -> Any:
    """As `ModelRunner` makes it: it hands out the logical slots of the scheduler."""
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

    return KVIndexTranslator(
        req_to_token=runner.req_to_token_pool.req_to_token,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        token_to_kv_pool=runner.token_to_kv_pool,
        page_size=runner.page_size,
        device=runner.device,
    )


@contextmanager
def sglang_context(device: str, **arguments: Any) -> Iterator[None]:
    """SGLang's process-wide state, as backends look it up: its arguments are published.

    Nothing resolves them, so that they are on a machine without a GPU what they are with
    one.
    """
    from sglang.srt.runtime_context import get_context, get_parallel, reset_context
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path="dummy", device=device, **arguments)
    get_context().set_server_args(args)
    parallel = dict(attn_cp_size=1, attn_dcp_size=1, attn_dcp_rank=0)
    try:
        with get_parallel().override(**parallel):
            yield
    finally:
        reset_context()
