"""`--dcp-replicate-q-proj` on real gloo ranks: the replicated Q is the ranks' own, in order.

Only this file compares the replicated projection with the sharded ones of all ranks (a gather
in the wrong order still gives a plausible model), its bias, and its refresh.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.gloo_ranks import (
    Outcomes,
    Worlds,
    enter_layout,
    fault_of,
    fork_worlds,
    leave_layout,
)
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.releases.installed import in_range, sglang_version

HIDDEN, HEAD_DIM, HEADS, KV_HEADS = 24, 4, 8, 2
NOPE, LATENT = 6, 5
# World size -> attn_tp.
LAYOUTS = {2: 1, 4: 2}
# Where DeepSeek's attention keeps whether a kernel reads `q_b_proj.weight` itself.
Q_B_GEMM = "use_min_latency_q_b_gemm"
if in_range(sglang_version(), "0.5.23", None):
    Q_B_GEMM = f"_{Q_B_GEMM}"


def fill(module: nn.Module, rank: int, seed: int) -> None:
    """Weights that differ on every rank."""
    gen = torch.Generator().manual_seed(1000 * seed + rank)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=gen))


class Gqa(nn.Module):
    """What `q_replication` knows of Llama's attention, with SGLang's QKV layer."""

    def __init__(self, layout: Layout, bias: bool) -> None:
        from sglang.srt.layers.linear import QKVParallelLinear

        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            HIDDEN,
            HEAD_DIM,
            HEADS,
            KV_HEADS * layout.dcp_size,
            bias=bias,
        )
        self.num_heads = HEADS // layout.tp_size
        self.q_size = self.num_heads * HEAD_DIM
        self.kv_size = KV_HEADS // layout.attn_tp_size * HEAD_DIM

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        sizes = [self.q_size, self.kv_size, self.kv_size]
        return list(self.qkv_proj(x)[0].split(sizes, dim=-1))


class Mla(nn.Module):
    """What it knows of DeepSeek's: a Q projection, `w_kc` and the absorbed prepare."""

    w_kc: torch.Tensor

    def __init__(self, layout: Layout, q_lora_rank: int | None) -> None:
        from sglang.srt.layers.linear import ColumnParallelLinear

        super().__init__()
        self.num_local_heads = HEADS // layout.tp_size
        self.q_lora_rank = q_lora_rank
        name = "q_proj" if q_lora_rank is None else "q_b_proj"
        self.add_module(name, ColumnParallelLinear(HIDDEN, HEADS * NOPE, bias=False))
        self._name = name
        self.register_buffer("w_kc", torch.empty(self.num_local_heads, NOPE, LATENT))
        setattr(self, Q_B_GEMM, True)

    def forward_absorb_prepare(self, x: torch.Tensor) -> torch.Tensor:
        q = getattr(self, self._name)(x)[0].view(-1, self.num_local_heads, NOPE)
        return torch.einsum("thd,hdl->thl", q, self.w_kc).flatten(1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.forward_absorb_prepare(x)]


class Place:
    """This rank, its DCP group and inputs that are the same on all ranks.

    Notes what it sees and judges at the end: a failing rank must not leave the others.
    """

    def __init__(self, layout: Layout, rank: int, group: Any) -> None:
        self.layout, self.rank, self.group = layout, rank, group
        self.x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
        self._pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def see_switch(self, replicas: Any, model: nn.ModuleList) -> None:
        """Sharded, replicated and sharded again; replicated q is all ranks' q, k and v stay."""
        replicas.select(replicated=False)
        sharded = [attention(self.x) for attention in model]
        wanted = [self.group.all_gather(q, dim=1) for q, *_ in sharded]
        replicas.select(replicated=True)
        replicated = [attention(self.x) for attention in model]
        replicas.select(replicated=False)
        again = [attention(self.x) for attention in model]
        for before, gathered, after, last in zip(sharded, wanted, replicated, again):
            self._pairs.append(("replicated q", after[0], gathered))
            self._pairs += zip(("replicated k", "replicated v"), after[1:], before[1:])
            self._pairs += [("sharded again", *pair) for pair in zip(last, before)]

    def judge(self) -> None:
        pairs, self._pairs = self._pairs, []
        assert pairs
        for what, got, wanted in pairs:
            torch.testing.assert_close(
                got, wanted, rtol=1e-5, atol=1e-5, msg=lambda m: f"{what}: {m}"
            )

    def check_model(self, *attentions: nn.Module) -> None:
        from sglang_dcp.layers.q_replication import QReplicas

        model = nn.ModuleList(attentions)
        fill(model, self.rank, seed=1)
        replicas = QReplicas(model, self.group)
        self.see_switch(replicas, model)
        fill(model, self.rank, seed=2)
        replicas.select(replicated=True)
        stale = [attention(self.x)[0] for attention in model]
        addresses = replicated_addresses(replicas)
        replicas.refresh()
        # A captured decode graph reads them where they were.
        assert replicated_addresses(replicas) == addresses
        fresh = [attention(self.x)[0] for attention in model]
        self.see_switch(replicas, model)
        # A replayed step costs the host nothing where the width stays: none is asked.
        nobody: Any = None
        replicas._attentions.append(nobody)
        replicas.select(replicated=False)
        self.judge()
        for old, new in zip(stale, fresh):
            assert not torch.allclose(old, new), "refresh gathers the new weights"


def replicated_addresses(replicas: Any) -> list[int]:
    """Where the replicated weights, biases and absorbed K weights lie."""
    found = []
    for replicated in replicas._attentions:
        tensors = (
            replicated._method.weight,
            replicated._method.bias,
            getattr(replicated, "_w_kc", None),
        )
        found += [t.data_ptr() for t in tensors if t is not None]
    assert found
    return found


def check_gqa(place: Place) -> None:
    place.check_model(Gqa(place.layout, bias=False))


def check_gqa_bias(place: Place) -> None:
    place.check_model(*(Gqa(place.layout, bias=True) for _ in range(2)))


def check_mla(place: Place) -> None:
    place.check_model(Mla(place.layout, None))


def check_mla_lora(place: Place) -> None:
    place.check_model(Mla(place.layout, 48))


def check_mla_after_an_error(place: Place) -> None:
    """A failing prepare leaves the module sharded."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention = Mla(place.layout, None)
    fill(attention, place.rank, seed=1)
    before = attention(place.x)[0]
    replicas = QReplicas(attention, place.group)
    replicas.select(replicated=True)
    with pytest.raises(RuntimeError):
        attention(place.x[:, 1:])
    assert attention.num_local_heads == HEADS // place.layout.tp_size
    replicas.select(replicated=False)
    assert torch.equal(attention(place.x)[0], before)
    assert not getattr(attention, Q_B_GEMM), "it would skip the replicated weight"


def check_no_attention(place: Place) -> None:
    from sglang_dcp.layers.q_replication import QReplicas

    with pytest.raises(DcpConfigError, match="--dcp-replicate-q-proj: Linear .*drop"):
        QReplicas(nn.Linear(2, 2), place.group)


def check_quantized_layer(place: Place) -> None:
    """Of a model that names no quantization, and so passed the refusals."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention = Gqa(place.layout, bias=False)
    attention.qkv_proj.quant_method = SimpleNamespace()
    with pytest.raises(DcpConfigError, match="SimpleNamespace.*drop the flag"):
        QReplicas(attention, place.group)


def check_packed_layer(place: Place) -> None:
    """On Intel's AMX engine a weight is packed: its rows are no heads."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention = Gqa(place.layout, bias=False)
    attention.qkv_proj.use_intel_amx_backend = True
    with pytest.raises(DcpConfigError, match="AMX engine.*drop the flag"):
        QReplicas(attention, place.group)


def check_other_forms_of_apply(place: Place) -> None:
    """SGLang's callers ask for them, and take `apply` where a layer has none."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention = Gqa(place.layout, bias=False)
    forms = [n for n in dir(attention.qkv_proj.quant_method) if n.startswith("apply")]
    QReplicas(attention, place.group)
    assert [n for n in forms if hasattr(attention.qkv_proj.quant_method, n)] == [
        "apply"
    ]


def check_hooks(place: Place) -> None:
    """`load_model` makes the replicas, every weight update refreshes them."""
    from sglang_dcp.layers.q_replication import after_load_model, around_weight_update

    model = nn.ModuleList([Gqa(place.layout, bias=True)])
    fill(model, place.rank, seed=1)
    runner = SimpleNamespace(model=model)
    assert after_load_model("result", runner) == "result"
    updater = SimpleNamespace(get_model_runner=lambda: runner)

    def update(seen: Any, tag: str, *, flush: bool) -> tuple[bool, str]:
        assert seen is updater and flush
        fill(model, place.rank, seed=3)
        return False, tag

    got = around_weight_update(update, updater, "failed half-way", flush=True)
    assert got == (False, "failed half-way")
    place.see_switch(runner.dcp_q_replicas, model)
    place.judge()


CHECKS = (
    check_gqa,
    check_gqa_bias,
    check_mla,
    check_mla_lora,
    check_mla_after_an_error,
    check_no_attention,
    check_quantized_layer,
    check_packed_layer,
    check_other_forms_of_apply,
    check_hooks,
)


def rank_body(rank: int, world_size: int) -> Outcomes:
    layout = Layout(world_size, LAYOUTS[world_size])
    group = enter_layout(DcpConfig(layout, replicate_q_proj=True), rank)
    place = Place(layout, rank, group)
    for check in CHECKS:
        yield check.__name__, fault_of(check, place)
    leave_layout()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world_size", LAYOUTS, ids=lambda n: f"tp{n}")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_ranks(check: Any, world_size: int, worlds: Worlds) -> None:
    worlds.assert_passed(world_size, check.__name__)


@pytest.mark.parametrize(
    "config", [None, DcpConfig(Layout(2, 1))], ids=["dcp-off", "not-replicated"]
)
def test_hooks_do_nothing_without_the_flag(config: DcpConfig | None) -> None:
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.layers.q_replication import after_load_model, around_weight_update

    if config is not None:
        set_context(DcpContext(config, 0))
    runner = SimpleNamespace()
    assert after_load_model("result", runner) == "result"
    assert around_weight_update(lambda updater: updater, runner) is runner
    assert vars(runner) == {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(fork_worlds(rank_body, sys.argv[2], LAYOUTS))
    sys.exit(pytest.main([__file__]))
