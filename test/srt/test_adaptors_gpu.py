"""The attention backends of a GPU under DCP, all ranks of a KVP group on one GPU.

Only this file sees kernels, plans and captured graphs of each adaptor with head sizes,
dtypes, fp8 scales and lengths of our choosing, against a float64 softmax over all keys.
The ranks run one after the other: a first pass notes each one's partial result, a second
gives it the merged one. Communication is tested elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from attention_oracle import Served, Shape, Step, Truth, decode, extend, mixed, move
from gpu import needs_gpus
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout

pytestmark = needs_gpus(1)

MAX_LEN = 1500
ROWS = 9
FP8 = torch.float8_e4m3fn
# What slots hold that no one has written: finite, as a used pool's, but far off.
GARBAGE = 300.0
TOLERANCE = {None: 3e-2, FP8: 8e-2}

SCRIPT = [
    # Longer than a tile, one token alone, and (at KVP > 1) ranks without a key.
    extend(a=1, b=7, c=130, d=1025),
    mixed(a=5, d=70, b=1, e=300, c=64),
    mixed(f=1),
    decode("abcdef"),
    decode("f"),
    mixed(f=1, a=1),
    move("cd"),
    decode("fdcb"),
]
# Of captured batches of four: full, and padded with SGLang's fill value.
REPLAYS = [decode("dcfa"), decode("fa"), move("a"), decode("adf")]
CAPTURED = 4


@dataclass(frozen=True)
class Case:
    """One adaptor at work; `scale` is what a checkpoint's fp8 K/V were divided by.

    `idle_scale` is one that the layer has and the cache, in the model's dtype, has not.
    """

    backend: str
    shape: Shape = Shape(8, 2, 128, 128)
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: Optional[torch.dtype] = None
    scale: Optional[float] = None
    idle_scale: Optional[float] = None
    dcp_size: int = 2
    page_size: int = 1


def heads(dim: int, q_heads: int = 8, kv_heads: int = 2) -> Shape:
    return Shape(q_heads, kv_heads, dim, dim)


def cases_of(backend: str, dims: tuple[int, ...]) -> dict[str, Case]:
    """`dims`: head sizes beside 128."""
    shapes = {
        "one-kv-head": heads(128, 8, 1),
        "no-grouping": heads(128, 4, 4),
        "own-heads-span-kv-heads": heads(128, 16, 8),
        "uneven-12-3": heads(128, 12, 3),
    }
    named = {name: Case(backend, shape) for name, shape in shapes.items()}
    named |= {f"dim{dim}": Case(backend, heads(dim)) for dim in dims}
    named |= {
        f"kvp{dcp}-page{page}": Case(backend, dcp_size=dcp, page_size=page)
        for dcp, page in ((2, 16), (2, 64), (4, 16), (8, 1))
    }
    named["kvp3"] = Case(backend, heads(128, 12, 2), dcp_size=3)
    named["fp16"] = Case(backend, dtype=torch.float16)
    named["fp8"] = Case(backend, kv_dtype=FP8)
    named["fp8-page64-kvp4"] = Case(backend, kv_dtype=FP8, dcp_size=4, page_size=64)
    named["fp8-scaled"] = Case(backend, kv_dtype=FP8, scale=0.5)
    named["fp8-of-fp16"] = Case(backend, dtype=torch.float16, kv_dtype=FP8)
    named["idle-scale"] = Case(backend, idle_scale=0.5)
    return {f"{backend}-{name}": case for name, case in named.items()}


CASES = {
    **cases_of("fa3", (64, 96, 192, 256)),
    **cases_of("flashinfer", (64, 256)),
    **cases_of("triton", (64, 80, 256)),
}


class StashExchange:
    """Notes a rank's partial result; answers with `merged` once it is known."""

    def __init__(self, own: slice) -> None:
        self._own = own
        self.all_heads: Optional[Tensor] = None
        self.partial: Optional[tuple[Tensor, Tensor]] = None
        self.merged: Optional[tuple[Tensor, Tensor]] = None

    def gather_heads(self, q: Tensor) -> Tensor:
        assert self.all_heads is not None
        return self.all_heads

    def reduce(self, out: Tensor, lse: Tensor, **kwargs: Any) -> Any:
        self.partial = out, lse
        if not kwargs.get("return_lse"):
            return out
        return self.merged or (out[:, self._own], lse[:, self._own])


class Rank:
    """One rank's pool and backend, built on a stand-in for SGLang's `ModelRunner`."""

    def __init__(self, case: Case, kvp_rank: int, table: Tensor, slots: int) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        from sglang_dcp.context import DcpContext
        from sglang_dcp.layers.adaptors.registry import adaptor_class
        from sglang_dcp.layers.attention import DcpAttentionBackend
        from sglang_dcp.layers.local_runner import LocalRunner
        from sglang_dcp.layers.local_view import LocalViewBuilder

        config = DcpConfig(Layout(case.dcp_size, 1), page_size=case.page_size)
        shape = case.shape
        self.own_heads = shape.q_heads // case.dcp_size
        first = kvp_rank * self.own_heads
        self.own = slice(first, first + self.own_heads)
        self.pool = make_pool(case, slots)
        views = LocalViewBuilder(table, case.dcp_size, kvp_rank)
        runner = LocalRunner(
            make_runner(case, table, self.pool), views.local_table, config
        )
        self.exchange = StashExchange(self.own)
        self.backend = DcpAttentionBackend(
            adaptor_class(case.backend).from_runner(runner),
            views,
            self.exchange,  # type: ignore[arg-type]
            DcpContext(config, kvp_rank),
            None,
            self.pool,
        )
        scaling = shape.qk_dim**-0.5
        self.layer = RadixAttention(
            self.own_heads, shape.qk_dim, scaling, shape.kv_heads, 0
        )
        if (scale := case.scale or case.idle_scale) is not None:
            on_gpu = torch.tensor(scale, device="cuda")
            self.layer.k_scale = self.layer.v_scale = on_gpu
            self.layer.k_scale_float = self.layer.v_scale_float = scale


def make_pool(case: Case, slots: int) -> Any:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        slots,
        case.page_size,
        case.kv_dtype or case.dtype,
        case.shape.kv_heads,
        case.shape.qk_dim,
        1,
        "cuda",
        False,
    )
    for buffer in pool.get_kv_buffer(0):
        buffer.copy_(torch.full_like(buffer, GARBAGE, dtype=torch.float32))
    return pool


def make_runner(case: Case, table: Tensor, pool: Any) -> Any:
    """What SGLang's attention backends read of a `ModelRunner`."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.runtime_context import get_server_args

    shape, dcp = case.shape, case.dcp_size
    kv_dtype = case.kv_dtype or case.dtype
    args = get_server_args()
    args.kv_cache_dtype = "auto" if case.kv_dtype is None else "fp8_e4m3"
    args.attention_backend = case.backend
    text = SimpleNamespace(num_attention_heads=shape.q_heads)
    model = SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        context_len=MAX_LEN,
        get_num_kv_heads=lambda tp_size: shape.kv_heads * dcp // tp_size,
        head_dim=shape.qk_dim,
        hf_config=SimpleNamespace(
            architectures=["LlamaForCausalLM"], get_text_config=lambda: text
        ),
        hf_text_config=text,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        is_multimodal=False,
        linear_attn_registry_result=None,
        num_attention_heads=shape.q_heads,
        swa_v_head_dim=shape.v_dim,
        v_head_dim=shape.v_dim,
    )
    return SimpleNamespace(
        attention_chunk_size=None,
        device="cuda",
        dtype=case.dtype,
        gpu_id=0,
        init_new_workspace=False,
        is_draft_worker=False,
        kv_cache_dtype=kv_dtype,
        model_config=model,
        page_size=case.page_size * dcp,
        ps=SimpleNamespace(tp_size=dcp, attn_cp_size=1),
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=len(table)),
        server_args=args,
        sliding_window_size=None,
        spec_algorithm=None,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        use_mla_backend=False,
    )


class Group:
    """A KVP group: its ranks, the requests that they serve, and the truth."""

    def __init__(self, case: Case) -> None:
        self.case = case
        pages = 2 + sum(
            -(-MAX_LEN // (case.page_size * case.dcp_size)) for _ in range(ROWS)
        )
        self.served = Served(case.page_size, case.dcp_size, MAX_LEN, pages)
        stored = case.kv_dtype or case.dtype
        self.truth = Truth(case.shape, stored, MAX_LEN, "cuda", case.scale or 1.0)
        self.table = self.served.table.cuda()
        slots = pages * case.page_size
        self.ranks = [
            Rank(case, rank, self.table, slots) for rank in range(case.dcp_size)
        ]

    def batch(self, step: Step) -> tuple[dict[str, range], Any]:
        new = {name: self.served.grow(name, n) for name, n in step.tokens.items()}
        batch = self.served.batch(step.mode, new)
        for name, value in vars(batch).items():
            if isinstance(value, Tensor) and not name.endswith("_cpu"):
                setattr(batch, name, value.cuda())
        batch.encoder_lens = batch.spec_info = None
        batch.positions = torch.zeros_like(batch.out_cache_loc)
        self.table.copy_(self.served.table)
        return new, batch

    def inputs(self, new: dict[str, range]) -> list[Tensor]:
        """Q, K and V of all heads: [tokens, heads, dim]."""
        rows: tuple[list[Tensor], ...] = ([], [], [])
        for name, where in new.items():
            for part, values in zip(rows, self.truth.of(name, 0)):
                part.append(values[list(where)])
        return [torch.cat(part).to(self.case.dtype) for part in rows]

    def wanted(self, new: dict[str, range]) -> Tensor:
        """[tokens, heads, dim] float64."""
        return torch.cat(
            [self.truth.attention(name, 0, where) for name, where in new.items()]
        )

    def move(self, step: Step) -> None:
        """The scheduler gives requests other slots; their K and V go along."""
        for name in step.tokens:
            every = range(self.case.dcp_size)
            old = [list(self.served.local_slots(name, r).values()) for r in every]
            self.served.relocate(name)
            for r, (rank, before) in enumerate(zip(self.ranks, old)):
                after = list(self.served.local_slots(name, r).values())
                for buffer in (rank.pool.k_buffer[0], rank.pool.v_buffer[0]):
                    buffer[after] = buffer[before]
                    unused = sorted(set(before) - set(after))
                    buffer[unused] = buffer[self.case.page_size].clone()

    def merged(self) -> tuple[Tensor, Tensor]:
        """Of the noted partial results, in float64 and the adaptor's log base."""
        e = self.ranks[0].backend.adaptor.is_lse_base_on_e
        partials = [rank.exchange.partial for rank in self.ranks]
        lses = torch.stack([lse.double() for _, lse in partials])  # type: ignore[misc]
        exp, log = (torch.exp, torch.log) if e else (torch.exp2, torch.log2)
        total = exp(lses - lses.amax(0)).nan_to_num(0).sum(0)
        lse = lses.amax(0) + log(total)
        outs = [
            torch.where(own.isfinite()[..., None], out.double(), 0.0)
            * exp(own.double() - lse).nan_to_num(0)[..., None]
            for out, own in partials  # type: ignore[misc]
        ]
        return sum(outs), lse  # type: ignore[return-value]

    def check(self, got: Tensor, new: dict[str, range], where: str) -> None:
        tolerance = TOLERANCE[self.case.kv_dtype]
        torch.testing.assert_close(
            got.double(),
            self.wanted(new),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text: f"{where}: {text}",
        )

    def eager(self, step: Step, where: str) -> None:
        new, batch = self.batch(step)
        q, k, v = self.inputs(new)
        if step.mode == "DECODE":
            for rank in self.ranks:
                rank.backend.init_forward_metadata(batch)
                # A write with scales divides K and V in place.
                rank.backend.forward(q, k.clone(), v.clone(), rank.layer, batch)
            self.check(self.merged()[0], new, where)
            return
        outs = self._extend(q, k, v, batch)
        if any(batch.extend_prefix_lens_cpu):
            out, lse = self.merged()
            for rank in self.ranks:
                own = out[:, rank.own].to(q.dtype), lse[:, rank.own].float()
                rank.exchange.merged = own
            outs = self._extend(q, k, v, batch)
        for rank in self.ranks:
            rank.exchange.merged = None
        self.check(torch.cat(outs, 1), new, where)

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> list[Tensor]:
        found = []
        for rank in self.ranks:
            rank.exchange.all_heads = q
            rank.backend.init_forward_metadata(batch)
            own = q[:, rank.own].contiguous()
            out = rank.backend.forward(own, k.clone(), v.clone(), rank.layer, batch)
            found.append(out.view(own.shape))
        return found


class Graphs:
    """Captured decode of each rank: static inputs, and what the exchange was given."""

    def __init__(self, group: Group) -> None:
        self.group = group
        shape = group.case.shape
        sizes = (shape.q_heads, shape.kv_heads, shape.kv_heads)
        self.static = [
            torch.zeros(CAPTURED, n, shape.qk_dim, device="cuda").to(group.case.dtype)
            for n in sizes
        ]
        self.graphs, self.partials = [], []
        batch = self._padded(SimpleNamespace(batch_size=0), 0)
        for rank in group.ranks:
            rank.backend.init_cuda_graph_state(CAPTURED, CAPTURED)
            rank.backend.init_forward_metadata_out_graph(batch, in_capture=True)
            self._run(rank, batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run(rank, batch)
            self.graphs.append(graph)
            self.partials.append(rank.exchange.partial)

    def _run(self, rank: Rank, batch: Any) -> None:
        rank.backend.forward(*self.static, rank.layer, batch)

    def _padded(self, batch: Any, size: int) -> Any:
        """SGLang's padding: row 0, length 1; the slots are not padded."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        more = CAPTURED - size
        lens = getattr(batch, "seq_lens_cpu", torch.zeros(0, dtype=torch.int64))
        rows = getattr(batch, "req_pool_indices", lens.cuda())
        lens = torch.nn.functional.pad(lens, (0, more), value=1)
        slots = getattr(batch, "out_cache_loc", lens[:size].cuda())
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=CAPTURED,
            req_pool_indices=torch.nn.functional.pad(rows, (0, more)),
            seq_lens=lens.cuda(),
            seq_lens_cpu=lens,
            seq_lens_sum=int(lens.sum()),
            out_cache_loc=slots,
            positions=torch.zeros(CAPTURED, dtype=torch.int64, device="cuda"),
            encoder_lens=None,
            spec_info=None,
        )

    def replay(self, step: Step, where: str) -> None:
        new, batch = self.group.batch(step)
        size = len(new)
        inputs = self.group.inputs(new)
        padded = self._padded(batch, size)
        for rank, graph, partial in zip(self.group.ranks, self.graphs, self.partials):
            # For each rank: a write with scales divides K and V in place.
            for static, values in zip(self.static, inputs):
                static[:size] = values
            rank.backend.init_forward_metadata_out_graph(padded)
            graph.replay()
            rank.exchange.partial = partial[0][:size], partial[1][:size]
        self.group.check(self.group.merged()[0], new, where)


@pytest.fixture(autouse=True)
def sglang_context() -> Iterator[None]:
    """SGLang's process-wide state, as backends look it up."""
    from sglang.srt.runtime_context import get_context, get_parallel, reset_context
    from sglang.srt.server_args import ServerArgs

    get_context().set_server_args(ServerArgs(model_path="dummy", device="cuda"))
    parallel = dict(attn_cp_size=1, attn_dcp_size=1, attn_dcp_rank=0)
    try:
        with get_parallel().override(**parallel):
            yield
    finally:
        reset_context()


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str) -> None:
    from sglang.srt.runtime_context import get_parallel

    case = CASES[name]
    with get_parallel().override(attn_tp_size=case.dcp_size):
        group = Group(case)
        for number, step in enumerate(SCRIPT):
            if step.mode == "MOVE":
                group.move(step)
            else:
                group.eager(step, f"step {number}")
        graphs = Graphs(group)
        for number, step in enumerate(REPLAYS):
            if step.mode == "MOVE":
                group.move(step)
            else:
                graphs.replay(step, f"replay {number}")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
