"""Norm weights over all K heads: what each rank loads, by brute force over layouts.

Only this file looks at more ranks than a model can be run on here.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.loading import (
    EXPORT_ERROR,
    KvHeads,
    prepare_loading,
    refuse_export,
)
from sglang_dcp.releases.installed import in_range, sglang_version

DIM = 3
LAYOUTS = [
    pytest.param(Layout(tp, attn), heads, id=f"tp{tp}-attn{attn}-{heads}kv")
    for tp, attn, heads in (
        (2, 1, 2),
        (4, 2, 2),
        (4, 2, 4),
        (4, 2, 1),
        (8, 4, 2),
        (8, 2, 8),
        (6, 3, 6),
        (6, 2, 4),
        (4, 1, 3),
    )
]


def norm_of(heads: int, dims: int) -> torch.Tensor:
    """Every number tells its head and place. [heads * DIM] or [heads, DIM]."""
    full = torch.arange(heads * DIM, dtype=torch.float32)
    return full if dims == 1 else full.view(heads, DIM)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("layout", "heads"), LAYOUTS)
def test_sglangs_cut_gives_what_the_rank_holds(
    layout: Layout, heads: int, dims: int
) -> None:
    counts = KvHeads(layout, heads, DIM)
    full = norm_of(heads, dims)
    expanded = counts.expand(full).view(-1, DIM)
    assert len(expanded) == counts.seen == heads * layout.dcp_size
    # As models cut: replicas of a head are neighbours.
    width = max(1, counts.seen // layout.tp_size)
    replicas = max(1, layout.tp_size // counts.seen)
    for rank in range(layout.tp_size):
        first = rank // replicas * width
        want = full.view(heads, DIM)[list(layout.kv_shard(heads, rank))]
        assert torch.equal(expanded[first : first + width], want)


class CutNorm(nn.Module):
    """A norm that cuts its weight for a rank, as some models do."""

    def __init__(self, local: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((local * DIM,), float("nan")))
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]
        self._rank = rank

    def load(self, parameter: nn.Parameter, full: torch.Tensor) -> None:
        size = len(parameter)
        parameter.data.copy_(full[self._rank * size :][:size])


class WholeNorm(nn.Module):
    """A norm with the weight of all heads that SGLang's code sees."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads * DIM,), float("nan")))


class Attention(nn.Module):
    def __init__(self, q_heads: int, seen: int, layout: Layout, rank: int) -> None:
        super().__init__()
        from sglang.srt.layers.linear import QKVParallelLinear
        from sglang.srt.layers.radix_attention import RadixAttention

        ranks = layout.tp_size
        self.qkv_proj = QKVParallelLinear.__new__(QKVParallelLinear)
        nn.Module.__init__(self.qkv_proj)
        self.attn = RadixAttention(q_heads // ranks, DIM, 1.0, seen // ranks, 0)
        self.q_norm = CutNorm(q_heads // ranks, rank)
        self.k_norm = CutNorm(seen // ranks, rank)
        self.q_norm_of_all = WholeNorm(q_heads)
        self.k_norm_of_all = WholeNorm(seen)
        self.k_norm_of_one = WholeNorm(1)


class Model(nn.Module):
    def __init__(self, attention: nn.Module, config: Any) -> None:
        super().__init__()
        self.layer = attention
        self.config = config
        self.seen_while_loading = 0

    def load_weights(self, weights: Any) -> None:
        from sglang.srt.model_loader.weight_utils import default_weight_loader

        self.seen_while_loading = self.config.num_key_value_heads
        parameters = dict(self.named_parameters())
        for name, full in weights:
            parameter = parameters[name]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, full)


def scaled_config(heads: int, layout: Layout) -> Any:
    from sglang.srt.configs.model_config import AttentionArch

    text = SimpleNamespace(
        num_key_value_heads=heads * layout.dcp_size, dcp_kv_head_scale=layout.dcp_size
    )
    return SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        hf_config=text,
        hf_text_config=text,
        get_total_num_kv_heads=lambda: text.num_key_value_heads,
    )


@pytest.mark.parametrize("q_heads", [8, 4, 16], ids=["gqa", "mha", "q-as-seen"])
@pytest.mark.parametrize("rank", range(4))
def test_norms_of_a_model(q_heads: int, rank: int) -> None:
    """Q norms stay as they are, also where they have as many heads as a K norm."""
    heads = 8 if q_heads == 16 else 4
    layout = Layout(4, 2)
    config = scaled_config(heads, layout)
    seen = heads * layout.dcp_size
    model: Any = Model(Attention(q_heads, seen, layout, rank), config.hf_config)
    prepare_loading(model, config, layout)
    of_q, of_k = norm_of(q_heads, 1), norm_of(heads, 1) + 100
    one = norm_of(1, 1)
    model.load_weights(
        [
            ("layer.q_norm.weight", of_q),
            ("layer.k_norm.weight", of_k),
            ("layer.q_norm_of_all.weight", of_q),
            ("layer.k_norm_of_all.weight", of_k),
            ("layer.k_norm_of_one.weight", one),
        ]
    )
    held = of_k.view(heads, DIM)[list(layout.kv_shard(heads, rank))].flatten()
    layer = model.layer
    assert torch.equal(layer.q_norm.weight, of_q.chunk(4)[rank])
    assert torch.equal(layer.k_norm.weight, held)
    assert torch.equal(layer.q_norm_of_all.weight, of_q)
    assert torch.equal(layer.k_norm_of_all.weight.chunk(4)[rank], held)
    assert torch.equal(layer.k_norm_of_one.weight, one)
    # The checkpoint's count while it loads, and the scaled one before and after.
    assert model.seen_while_loading == heads
    assert config.hf_config.num_key_value_heads == seen


@pytest.mark.skipif(
    not in_range(sglang_version(), "0.5.23", None),
    reason="SGLang refuses to export weights as of 0.5.23",
)
@pytest.mark.parametrize("replicated_q", [False, True])
@pytest.mark.parametrize("arch", ["MHA", "MLA"])
def test_weights_that_dcp_cut_are_not_sent(arch: str, replicated_q: bool) -> None:
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.model_executor.model_runner_components.weight_exporter import (
        WeightExporter,
    )

    model = nn.Linear(2, 2)
    config = SimpleNamespace(attention_arch=AttentionArch[arch])
    refuse_export(model, config, replicated_q=replicated_q)
    exporter = WeightExporter(
        tp_rank=0,
        tp_size=2,
        gpu_id=0,
        get_model_path=lambda: "",
        get_model=lambda: model,
    )
    if arch == "MLA" and not replicated_q:
        assert exporter._weight_export_unsupported_reason() is None
        return
    for send in (
        exporter.init_weights_send_group_for_remote_instance,
        exporter.send_weights_to_remote_instance,
    ):
        named = {"group_rank": 0, "world_size": 2} if "init" in send.__name__ else {}
        sent = send(master_address="", ports="1,2", group_name="name", **named)
        assert sent == (False, EXPORT_ERROR)
    for save in (exporter.save_sharded_model, exporter.save_remote_model):
        with pytest.raises(RuntimeError, match="cut in another way"):
            save("folder")
    assert exporter.get_weights_by_name("weight") is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
