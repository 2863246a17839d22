"""`--dcp-replicate-q-proj` on real gloo ranks: each rank's Q is what the checkpoint says.

Only this file switches a model between all heads of the DCP group and the rank's own, and
gathers the K weights that MLA absorbs, in each form that SGLang keeps them in. The oracle
is the whole checkpoint, in float64.
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
from helpers.quantized import BLOCK, FORMATS
from helpers.quantized_layers import quant_config
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.context import get_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.releases.installed import in_range, sglang_version

HIDDEN, HEADS, KV_HEADS = 2 * BLOCK, 8, 2
HEAD_DIM, NOPE, LATENT = BLOCK, 64, 48
# World size -> attn_tp.
LAYOUTS = {2: 1, 4: 2}
# Where DeepSeek's attention keeps whether a kernel reads `q_b_proj.weight` itself.
Q_B_GEMM = "use_min_latency_q_b_gemm"
if in_range(sglang_version(), "0.5.23", None):
    Q_B_GEMM = f"_{Q_B_GEMM}"


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load(layer: Any, name: str, full: torch.Tensor, *part: str) -> None:
    parameter = getattr(layer, name)
    parameter.weight_loader(parameter, full, *part)


class Gqa(nn.Module):
    """What `q_replication` knows of Llama's attention, with SGLang's QKV layer."""

    def __init__(self, layout: Layout, bias: bool, quant: Any = None) -> None:
        from sglang.srt.layers.linear import QKVParallelLinear

        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            HIDDEN,
            HEAD_DIM,
            HEADS,
            KV_HEADS * layout.dcp_size,
            bias=bias,
            quant_config=quant,
            prefix="self_attn.qkv_proj",
        )
        self._layout = layout
        self.num_heads = HEADS // layout.tp_size
        self.q_size = self.num_heads * HEAD_DIM
        self.kv_size = KV_HEADS // layout.attn_tp_size * HEAD_DIM

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        sizes = [self.q_size, self.kv_size, self.kv_size]
        return list(self.qkv_proj(x)[0].split(sizes, dim=-1))

    def _parts(self, seed: int, *inputs: int) -> dict[str, torch.Tensor]:
        rows = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
        return {
            part: drawn(seed + i, heads * HEAD_DIM, *inputs)
            for i, (part, heads) in enumerate(rows.items())
        }

    def load(self, seed: int) -> None:
        for part, full in self._parts(seed, HIDDEN).items():
            load(self.qkv_proj, "weight", full, part)
        if self.qkv_proj.bias is not None:
            for part, full in self._parts(seed + 10).items():
                load(self.qkv_proj, "bias", full, part)

    def wanted(
        self, seed: int, x: torch.Tensor, rank: int, replicated: bool
    ) -> list[torch.Tensor]:
        weights, biases = self._parts(seed, HIDDEN), self._parts(seed + 10)
        if self.qkv_proj.bias is None:
            biases = {part: torch.zeros_like(bias) for part, bias in biases.items()}
        return self.cut(weights, biases, x, rank, replicated)

    def cut(
        self, weights: Any, biases: Any, x: torch.Tensor, rank: int, replicated: bool
    ) -> list[torch.Tensor]:
        """Outputs of all heads by brute force, then the rows of this rank."""
        shard = rank // self._layout.dcp_size
        ranks, place = self._layout.attn_tp_size, shard
        found = []
        for part in "qkv":
            if part == "q" and not replicated:
                ranks_of_part, place = self._layout.tp_size, rank
            else:
                ranks_of_part, place = ranks, shard
            whole = x.double() @ weights[part].double().T + biases[part].double()
            found.append(whole.chunk(ranks_of_part, dim=-1)[place].float())
        return found


class Mla(nn.Module):
    """What it knows of DeepSeek's: a Q projection, `w_kc` and the absorbed prepare."""

    def __init__(self, layout: Layout, q_lora_rank: int | None) -> None:
        from sglang.srt.layers.linear import ColumnParallelLinear

        super().__init__()
        self._layout = layout
        self.num_local_heads = HEADS // layout.tp_size
        self.qk_head_dim = NOPE
        self.q_lora_rank = q_lora_rank
        self._name = "q_proj" if q_lora_rank is None else "q_b_proj"
        self.add_module(
            self._name, ColumnParallelLinear(HIDDEN, HEADS * NOPE, bias=False)
        )
        self.w_kc: Any = None
        self.w_scale: Any = 1.0
        self.w_scale_k: Any = None
        setattr(self, Q_B_GEMM, True)

    @property
    def q_layer(self) -> Any:
        return getattr(self, self._name)

    def forward_absorb_prepare(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_layer(x)[0].view(-1, self.num_local_heads, NOPE)
        return torch.einsum("thd,hdl->thl", q, self.k_weights()).flatten(1)

    def k_weights(self) -> torch.Tensor:
        """What SGLang's product takes `w_kc` for."""
        if self.w_scale_k is not None:
            return self.w_kc.float() * self.w_scale_k
        if self.w_kc.itemsize == 1:
            return self.w_kc.float() * self.w_scale
        return self.w_kc

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.forward_absorb_prepare(x)]

    def _k_of_all(self, seed: int) -> torch.Tensor:
        # Heads of different magnitude: no other head's scale fits.
        sizes = torch.arange(1, HEADS + 1)[:, None, None]
        return drawn(seed + 5, HEADS, NOPE, LATENT) * sizes

    def load(self, seed: int) -> None:
        load(self.q_layer, "weight", drawn(seed, HEADS * NOPE, HIDDEN))
        rank = self.rank
        own = self._k_of_all(seed).chunk(self._layout.tp_size)[rank]
        self.set_k(own.transpose(1, 2).contiguous().transpose(1, 2))

    rank = 0

    def set_k(self, own: torch.Tensor) -> None:
        """As SGLang: into the tensor that is there."""
        self.w_kc = own if self.w_kc is None else self.w_kc.copy_(own)

    def wanted(
        self, seed: int, x: torch.Tensor, rank: int, replicated: bool
    ) -> list[torch.Tensor]:
        q = x.double() @ drawn(seed, HEADS * NOPE, HIDDEN).double().T
        k = self._k_of_all(seed).double()
        every = torch.einsum("thd,hdl->thl", q.view(len(x), HEADS, NOPE), k)
        size = self._layout.dcp_size
        ranks = self._layout.attn_tp_size if replicated else self._layout.tp_size
        part = every.chunk(ranks, dim=1)[rank // size if replicated else rank]
        return [part.flatten(1).float()]


class MlaOneScale(Mla):
    """fp8 with one scale, which each rank computes from its own heads."""

    def set_k(self, own: torch.Tensor) -> None:
        self.w_scale = own.abs().max() / 448
        super().set_k((own / self.w_scale).to(torch.float8_e4m3fn))


class MlaBlockScales(Mla):
    """fp8 with a scale for each head: as for DeepGEMM, whose layout is not swapped."""

    def set_k(self, own: torch.Tensor) -> None:
        scales = own.abs().amax((1, 2), keepdim=True) / 448
        if self.w_scale_k is None:
            self.w_scale_k = scales
        else:
            self.w_scale_k.copy_(scales)
        super().set_k((own / scales).contiguous().to(torch.float8_e4m3fn))


class Place:
    """This rank, its DCP group and inputs that are the same on all ranks.

    Notes what it sees and judges at the end: a failing rank must not leave the others.
    """

    def __init__(self, layout: Layout, rank: int, group: Any) -> None:
        self.layout, self.rank, self.group = layout, rank, group
        self.x = drawn(1, 3, HIDDEN)
        self._pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def see_switch(self, replicas: Any, model: Any, seed: int) -> None:
        """The rank's own heads, those of its group, and its own again."""
        for replicated in (False, True, False):
            replicas.select(replicated=replicated)
            for attention in model:
                got = attention(self.x)
                want = attention.wanted(seed, self.x, self.rank, replicated)
                assert len(got) == len(want)
                what = f"replicated {replicated}"
                self._pairs += [(what, *pair) for pair in zip(got, want)]

    def judge(self, tolerance: float = 1e-5) -> None:
        pairs, self._pairs = self._pairs, []
        assert pairs
        for what, got, wanted in pairs:
            assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
            far = float(
                (got.double() - wanted.double()).norm() / wanted.double().norm()
            )
            assert far < tolerance, f"{what}: {far}"

    def build(self, *attentions: Any) -> Any:
        """Loaded with seed 1, at the widths that the hooks give."""
        from sglang_dcp.layers.q_replication import replicate_q_projections

        model: Any = nn.ModuleList(attentions)
        replicate_q_projections(model, get_context())
        for attention in model:
            attention.rank = self.rank
            attention.load(1)
        return model

    def check_model(self, *attentions: nn.Module, tolerance: float = 1e-5) -> None:
        from sglang_dcp.layers.q_replication import QReplicas

        model = self.build(*attentions)
        replicas = QReplicas(model, self.group)
        self.see_switch(replicas, model, 1)
        before = addresses(model, replicas)
        for attention in model:
            attention.load(2)
        replicas.refresh()
        # A captured decode graph reads them where they were.
        assert addresses(model, replicas) == before
        self.see_switch(replicas, model, 2)
        # A replayed step costs the host nothing where the width stays: none is asked.
        nobody: Any = None
        replicas._attentions.append(nobody)
        replicas.select(replicated=False)
        self.judge(tolerance)


def addresses(model: nn.Module, replicas: Any) -> list[int]:
    """Where decode reads weights, biases and absorbed K weights."""
    found = [parameter.data_ptr() for parameter in model.parameters()]
    for replicated in replicas._attentions:
        absorbed = getattr(replicated, "_absorbed", None)
        if absorbed is not None:
            found += [tensor.data_ptr() for tensor in absorbed._of_all.values()]
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


def check_mla_of_one_scale(place: Place) -> None:
    """One rounding to fp8: a scale of another rank would be off by a factor."""
    place.check_model(MlaOneScale(place.layout, None), tolerance=0.04)


def check_mla_of_block_scales(place: Place) -> None:
    place.check_model(MlaBlockScales(place.layout, None), tolerance=0.04)


def check_nothing_is_held_twice(place: Place) -> None:
    """One layer of attn_tp width, and one `w_kc` of all heads with the own ones in it."""
    from sglang_dcp.layers.q_replication import QReplicas

    model: Any = place.build(Gqa(place.layout, bias=True), Mla(place.layout, None))
    replicas: Any = QReplicas(model, place.group)
    gqa, mla = model
    q = HEADS // place.layout.attn_tp_size
    rows = (q + 2 * KV_HEADS // place.layout.attn_tp_size) * HEAD_DIM
    held = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert held == {
        "0.qkv_proj.weight": (rows, HIDDEN),
        "0.qkv_proj.bias": (rows,),
        "1.q_proj.weight": (q * NOPE, HIDDEN),
    }
    whole = replicas._attentions[1]._absorbed._of_all["w_kc"]
    assert whole.shape == (q, NOPE, LATENT)
    assert mla.w_kc.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    tensors = [
        t for t in vars(gqa.qkv_proj.quant_method).values() if torch.is_tensor(t)
    ]
    assert not tensors
    products = replicas.own_products()
    own = HEADS // place.layout.tp_size
    assert [p.outputs for p in products] == [own * HEAD_DIM, own * NOPE, own * LATENT]
    assert products[0].weight_bytes == own * HEAD_DIM * (HIDDEN + 1) * 4
    assert products[2].weight_bytes == own * NOPE * LATENT * 4


def check_fp8_blocks_by_rows(place: Place) -> None:
    """In extend, the method gets views of the rank's rows, and of their scales."""
    check_quantized(place, "fp8-block", whole=False)


def check_fp8_tensor_whole(place: Place) -> None:
    """Kernels of other formats take another layout: their outputs are cut."""
    check_quantized(place, "fp8-tensor", whole=True)


def check_quantized(place: Place, name: str, whole: bool) -> None:
    from sglang_dcp.layers.q_replication import QReplicas

    form = FORMATS[name]
    attention: Any = Gqa(place.layout, bias=False, quant=quant_config(form))
    layer, method = attention.qkv_proj, attention.qkv_proj.quant_method
    stored = {
        part: form.quantize(full) for part, full in attention._parts(1, HIDDEN).items()
    }
    for part, tensors in stored.items():
        for key, full in tensors.items():
            load(layer, key, full, part)
    seen = []

    def apply(rows: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        """In the place of a kernel. Each part of a tensor-wide scale has its own rows."""
        found = {"weight": rows.weight.data}
        seen.append(len(rows.weight))
        if name == "fp8-block":
            found["weight_scale_inv"] = rows.weight_scale_inv.data
        else:
            widths = torch.tensor(layer.output_partition_sizes)
            scales = rows.weight_scale.data.repeat_interleave(widths)
            found["weight_scale"] = scales[:, None]
        return (x.double() @ form.dequantize(found).T).float()

    method.apply = apply
    replicas = QReplicas(nn.ModuleList([attention]), place.group)
    weights = {part: form.dequantize(tensors) for part, tensors in stored.items()}
    biases = {part: torch.zeros(len(full)) for part, full in weights.items()}
    for replicated in (False, True, False):
        replicas.select(replicated=replicated)
        got = attention(place.x)
        want = attention.cut(weights, biases, place.x, place.rank, replicated)
        place._pairs += [(f"replicated {replicated}", *pair) for pair in zip(got, want)]
    place.judge()
    rows = len(layer.weight)
    assert whole == (set(seen) == {rows}), (seen, rows)


def check_sharded_layer(place: Place) -> None:
    """A layer of the rank's own heads would give a plausible model with wrong ones."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention = Mla(place.layout, None)
    with pytest.raises(RuntimeError, match="not attn_tp width"):
        QReplicas(attention, place.group)


def check_mla_after_an_error(place: Place) -> None:
    """A failing prepare leaves the module with its own heads."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention: Any = place.build(Mla(place.layout, None))[0]
    replicas = QReplicas(attention, place.group)
    before = attention(place.x)[0]
    replicas.select(replicated=True)
    with pytest.raises(RuntimeError):
        attention(place.x[:, 1:])
    assert attention.num_local_heads == HEADS // place.layout.tp_size
    replicas.select(replicated=False)
    assert torch.equal(attention(place.x)[0], before)
    assert not getattr(attention, Q_B_GEMM), "it would skip the choice of heads"


def check_no_attention(place: Place) -> None:
    from sglang_dcp.layers.q_replication import QReplicas

    with pytest.raises(DcpConfigError, match="--dcp-replicate-q-proj: Linear .*drop"):
        QReplicas(nn.Linear(2, 2), place.group)


def check_packed_layer(place: Place) -> None:
    """Intel's AMX engine packs `w_kc`: its rows are no heads. A packed QKV layer works."""
    from sglang_dcp.layers.q_replication import QReplicas

    model: Any = place.build(Mla(place.layout, None), Gqa(place.layout, bias=False))
    mla, gqa = model
    mla.q_layer.use_intel_amx_backend = True
    with pytest.raises(DcpConfigError, match="AMX engine.*drop the flag"):
        QReplicas(mla, place.group)
    method = gqa.qkv_proj.quant_method
    method.apply = lambda layer, x, bias=None: x @ layer.weight.T
    gqa.qkv_proj.use_intel_amx_backend = True
    place.see_switch(QReplicas(gqa, place.group), nn.ModuleList([gqa]), 1)
    place.judge()


def check_other_forms_of_apply(place: Place) -> None:
    """SGLang's callers ask for them, and take `apply` where a layer has none."""
    from sglang_dcp.layers.q_replication import QReplicas

    attention: Any = place.build(Gqa(place.layout, bias=False))[0]
    forms = [n for n in dir(attention.qkv_proj.quant_method) if n.startswith("apply")]
    QReplicas(attention, place.group)
    assert [n for n in forms if hasattr(attention.qkv_proj.quant_method, n)] == [
        "apply"
    ]


def check_hooks(place: Place) -> None:
    """`load_model` finds the layers, every weight update gathers again."""
    from sglang_dcp.layers.q_replication import after_load_model, around_weight_update

    model = place.build(Gqa(place.layout, bias=True), Mla(place.layout, None))
    runner = SimpleNamespace(model=model)
    assert after_load_model("result", runner) == "result"
    updater = SimpleNamespace(get_model_runner=lambda: runner)

    def update(seen: Any, tag: str, *, flush: bool) -> tuple[bool, str]:
        assert seen is updater and flush
        for attention in model:
            attention.load(3)
        return False, tag

    got = around_weight_update(update, updater, "failed half-way", flush=True)
    assert got == (False, "failed half-way")
    place.see_switch(runner.dcp_q_replicas, model, 3)
    place.judge()


CHECKS = (
    check_gqa,
    check_gqa_bias,
    check_mla,
    check_mla_lora,
    check_mla_of_one_scale,
    check_mla_of_block_scales,
    check_nothing_is_held_twice,
    check_fp8_blocks_by_rows,
    check_fp8_tensor_whole,
    check_sharded_layer,
    check_mla_after_an_error,
    check_no_attention,
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
