"""What an inner backend is told of a decode step is what `forward` hands to its kernel.

SGLang's backends size plans and buffers by the heads and requests of a `RunnerView`. The
rows of a call are made elsewhere (`DecodeAttention`). Only this file compares the two, for
every layout: a kernel would read other heads' keys, or write beyond its buffers.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional
from unittest import mock

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch, ModelConfig
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor

from helpers.allocating_ranks import serving
from helpers.attention_oracle import FakePool, Served, Shape, decode, verify
from helpers.backend_ranks import Case, logical_translator
from helpers.parallel import attention_width
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import attention
from sglang_dcp.layers.backends.base import InnerBackend, Partial
from sglang_dcp.layers.backends.triton import TritonBackend
from sglang_dcp.layers.heads import scale_kv_heads
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version

REQUESTS, CAPTURED = 5, 3
QK, V = 24, 16


class Plan(NamedTuple):
    """What SGLang's backends read where they are built, and where graphs are made."""

    heads: set[int]
    kv_heads: int
    requests: int


class PlanningBackend(InnerBackend):
    """It plans as SGLang's backends do, and keeps the shapes of the calls."""

    is_lse_base_on_e = True

    def __init__(self, runner: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        ranks, model = get_parallel().attn_tp_size, runner.model_config
        # FlashInfer with latents, and FA3's metadata.
        every = [model.num_attention_heads, model.hf_text_config.num_attention_heads]
        if hasattr(model, "get_max_num_attention_heads"):
            # Triton, and FlashInfer with heads.
            every.append(model.get_max_num_attention_heads())
        assert not any(heads % ranks for heads in every)
        self.plan = Plan(
            {heads // ranks for heads in every},
            1 if runner.use_mla_backend else model.get_num_kv_heads(ranks),
            runner.req_to_token_pool.size,
        )
        self.captured = (0, 0)
        self.called: list[tuple[int, int]] = []

    @classmethod
    def from_runner(cls, runner: Any) -> PlanningBackend:
        return cls(runner)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.captured = max_bs, max_num_tokens

    def init_graph_metadata(self, local: Any, in_capture: bool) -> None:
        pass

    def decode(self, q: Tensor, layer: Any, local: Any) -> Partial:
        assert q.shape[0] == local.batch_size == len(local.seq_lens)
        self.called.append((q.shape[0], q.shape[1]))
        return Partial(q.new_zeros(*q.shape[:2], V), q.new_zeros(q.shape[:2]))

    def decode_parts(self, latent: Tensor, rope: Tensor, *more: Any) -> Partial:
        assert latent.shape[:2] == rope.shape[:2]
        return self.decode(latent, *more)

    def extend_new_tokens(self, *args: Any) -> Partial:
        raise NotImplementedError

    def extend_paged_prefix(self, *args: Any) -> Partial:
        raise NotImplementedError


class TiledBackend(PlanningBackend):
    head_tile = TritonBackend.head_tile


class Setting(NamedTuple):
    """A layout, the heads of a model, and the query tokens of a request."""

    attn_tp: int
    dcp: int
    heads: int
    kv_heads: int
    width: int
    latent: bool = False
    replicated: bool = False

    @property
    def ranks(self) -> int:
        return self.attn_tp * self.dcp


SETTINGS = [
    Setting(attn_tp, dcp, heads, kv_heads, width, latent, replicated)
    for attn_tp, dcp, width, (heads, kv_heads, latent), replicated in itertools.product(
        (1, 2, 4),
        (2, 3),
        (1, 2, 3, 8),
        (
            # Heads of the model. Fewer K/V heads than attention ranks are replicated.
            (48, 4, False),
            (48, 2, False),
            (48, 48, False),
            (144, 12, False),
            (240, 4, False),
            (48, 1, True),
            (192, 1, True),
        ),
        (False, True),
    )
]


class WholeGroup:
    """An exchange among ranks that all have the same queries."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def gather_heads(self, q: Tensor) -> Tensor:
        return q.repeat(1, self._ranks, 1)

    def reduce(self, out: Tensor, lse: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        heads = out.shape[1] // self._ranks
        return out[:, :heads].contiguous(), lse[:, :heads].contiguous()


def make_model(setting: Setting, config: DcpConfig) -> Any:
    """SGLang's own, so that its methods are bound to an object that knows no view."""
    model: Any = object.__new__(ModelConfig)
    text = SimpleNamespace(
        num_attention_heads=setting.heads, num_key_value_heads=setting.kv_heads
    )
    model.hf_text_config = model.hf_config = text
    latent = setting.latent
    model.attention_arch = AttentionArch.MLA if latent else AttentionArch.MHA
    model.num_attention_heads, model.context_len = setting.heads, 64
    model.is_draft_model = False
    model.get_total_num_kv_heads = lambda: text.num_key_value_heads
    scale_kv_heads(model, config)
    return model


def make_runner(setting: Setting, config: DcpConfig, table: Tensor, pool: Any) -> Any:
    runner = SimpleNamespace(
        device="cpu",
        is_draft_worker=False,
        model_config=make_model(setting, config),
        page_size=setting.dcp,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=REQUESTS),
        server_args=SimpleNamespace(
            attention_backend="torch_native",
            speculative_algorithm="EAGLE" if setting.width > 1 else None,
            speculative_num_draft_tokens=setting.width,
        ),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        use_mla_backend=setting.latent,
    )
    if in_range(sglang_version(), "0.5.19", None):
        runner.kv_index_translator = logical_translator(runner)
    return runner


@contextmanager
def started(config: DcpConfig) -> Iterator[None]:
    """A rank of a server, but for what other ranks and other arguments are for."""
    from sglang.srt.runtime_context import get_parallel

    set_context(DcpContext(config, 0))
    exchange = WholeGroup(config.dcp_size)
    stand_ins = dict(
        create_exchange=lambda *args: exchange,
        get_dcp_group=lambda: None,
        kv_sizes_of=lambda *args: None,
        mla_sizes=lambda *args: None,
        # It reads the dtypes of a pool.
        short_prefill_of=lambda *args: None,
        workspace_spec=lambda *args: None,
    )
    with ExitStack() as stack:
        stack.callback(clear_context)
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(attention, name, stand_in))
        resolved = mock.patch.object(
            type(sglang_api()), "resolved", lambda *args: args[-1]
        )
        stack.enter_context(resolved)
        stack.enter_context(attention_width(config.tp_size))
        # As with our hooks, SGLang's own DCP is off.
        stack.enter_context(get_parallel().override(attn_dcp_size=1))
        yield


class AtWork:
    """One rank that was built as a server builds it."""

    def __init__(self, setting: Setting, kind: type[PlanningBackend]) -> None:
        self.setting, self.served = setting, Served(1, setting.dcp)
        config = DcpConfig(Layout(setting.ranks, setting.attn_tp))
        shape = Shape(setting.heads, setting.kv_heads, QK, V, latent=setting.latent)
        with started(config):
            of_rank = max(1, setting.kv_heads // setting.attn_tp)
            pool = FakePool(shape, of_rank, 400, 1, torch.float32)
            runner = make_runner(setting, config, self.served.table, pool)
            self.backend = attention.DcpAttentionBackend.for_runner(kind, runner)
        self.layer = RadixAttention(
            setting.heads // setting.ranks, QK, 1.0, of_rank, 0, v_head_dim=V
        )
        self.inner: Any = self.backend.backend

    def batch(self, names: str) -> Any:
        for name in names:
            self.served.grow(name, 7)
        make = (
            decode(names)
            if self.setting.width == 1
            else verify(names, self.setting.width)
        )
        new = {name: self.served.grow(name, n) for name, n in make.tokens.items()}
        return self.served.batch(make.mode, new)

    def forward(self, batch: Any) -> Tensor:
        """As a model calls: MLA's rows come in two parts."""
        setting, layer = self.setting, self.layer
        tokens, more = batch.batch_size * setting.width, {}
        heads = layer.tp_q_head_num * (setting.dcp if setting.replicated else 1)
        q, k = torch.zeros(tokens, heads, QK), torch.zeros(
            tokens, layer.tp_k_head_num, QK
        )
        v = k[..., :V]
        if setting.latent:
            more = dict(q_rope=q[..., V:], k_rope=k[..., V:])
            q, k = q[..., :V], k[..., :V]
        return self.backend.forward(q, k, v, layer, batch, **more)


def check(setting: Setting, kind: type[PlanningBackend]) -> None:
    at_work = AtWork(setting, kind)
    inner, layer, width = at_work.inner, at_work.layer, setting.width
    names = "abcde"
    batch = at_work.batch(names)
    at_work.backend.init_forward_metadata(batch)
    out = at_work.forward(batch)
    assert out.shape == (len(names) * width, layer.tp_q_head_num * V)
    at_work.backend.init_cuda_graph_state(CAPTURED, CAPTURED * width)
    captured = at_work.batch(names[:CAPTURED])
    at_work.backend.init_forward_metadata_out_graph(captured, in_capture=True)
    at_work.forward(captured)

    [(rows, heads), (of_graph, same)] = inner.called
    assert inner.plan.heads == {heads} and heads == same
    assert inner.plan.kv_heads == layer.tp_k_head_num
    assert rows == len(names) <= inner.plan.requests
    assert of_graph == CAPTURED == inner.captured[0] == inner.captured[1]
    # Of each K/V head: query tokens x the group's heads that it serves, and padding.
    served = heads // inner.plan.kv_heads
    used = width * layer.tp_q_head_num * setting.dcp // layer.tp_k_head_num
    tile: Optional[int] = kind.head_tile
    assert served >= used and heads % inner.plan.kv_heads == 0
    if tile is None or width == 1 or inner.plan.kv_heads == 1 or used <= tile:
        assert served == used
    else:
        assert served % tile == 0 and served - used < tile


@pytest.mark.parametrize("kind", [PlanningBackend, TiledBackend])
@pytest.mark.parametrize("width", sorted({setting.width for setting in SETTINGS}))
@pytest.mark.parametrize("attn_tp", sorted({setting.attn_tp for setting in SETTINGS}))
def test_a_call_has_the_heads_and_requests_that_were_planned(
    attn_tp: int, width: int, kind: type[PlanningBackend]
) -> None:
    for setting in SETTINGS:
        if (setting.attn_tp, setting.width) == (attn_tp, width):
            # Shown where a check fails.
            print(setting)
            check(setting, kind)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("heads, kv_heads", [(8, 1), (8, 2), (24, 3), (8, 8), (36, 2)])
def test_sglangs_triton_backend_plans_the_heads_of_its_call(
    heads: int, kv_heads: int, width: int
) -> None:
    """Its plan holds outputs of splits, which the kernel writes head after head."""
    shape = Shape(heads, kv_heads, 64, 64)
    case = Case("triton", shape, device="cpu", width=width, max_len=100)
    with serving(case) as (at_work, sizes):
        inner, calls = at_work.inner, []
        inner.decode_attention_fwd = lambda *args, **more: calls.append(args)
        for request in "abc":
            at_work.group.served.grow(request, 20)
        at_work.peak(decode("abc") if width == 1 else verify("abc", width))
    [(q, keys, _, out, _, _, outputs, lses, *_)] = calls
    assert q.shape[:2] == out.shape[:2] == outputs.shape[:2] == lses.shape[:2]
    assert q.shape[:2] == (3, sizes.folding.heads)
    assert (inner.num_head, inner.num_kv_head) == (q.shape[1], keys.shape[1])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
