"""K/V heads cut over attn_tp: the model config's count and what the weight loader takes.

Only this file loads a checkpoint's q, k and v through SGLang's own QKV layer for each
rank of many layouts and compares with heads cut by hand; a server test sees few. Adapters
of that layer are cut beside it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.parallel import attention_width
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.demo.tiny_model import make_tiny_model
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks.cpu import without_pinned_memory
from sglang_dcp.layers.heads import scale_kv_heads

HIDDEN, HEAD_DIM = 10, 4
LAYOUTS = {
    "tp4-attn2": (Layout(4, 2), 8, 4),
    "tp4-attn2-one-kv-a-shard": (Layout(4, 2), 8, 2),
    "tp4-attn2-replicated": (Layout(4, 2), 8, 1),
    "tp4-attn1": (Layout(4, 1), 8, 2),
    "tp4-attn1-uneven": (Layout(4, 1), 12, 3),
    "tp2-attn1-mha": (Layout(2, 1), 4, 4),
    "tp6-attn2-dcp3": (Layout(6, 2), 12, 4),
    "tp6-attn3": (Layout(6, 3), 12, 6),
    "tp8-attn4-replicated": (Layout(8, 4), 16, 2),
    "tp8-attn2-many-kv": (Layout(8, 2), 16, 16),
}

Q_WIDTHS = pytest.mark.parametrize(
    "replicated", [False, True], ids=["sharded-q", "wide-q"]
)


def checkpoint(heads: int, kv_heads: int, v_dim: int, *more: int) -> dict[str, Any]:
    """Full q, k, v; every row tells its part, head and place."""
    rows = {"q": heads * HEAD_DIM, "k": kv_heads * HEAD_DIM, "v": kv_heads * v_dim}
    gen = torch.Generator().manual_seed(3)
    return {part: torch.randn(n, *more, generator=gen) for part, n in rows.items()}


def by_hand(
    full: dict[str, Any],
    layout: Layout,
    kv_heads: int,
    rank: int,
    replicated: bool = False,
) -> Any:
    """Rows of `rank`: own q heads, then the k and v heads of its attn_tp shard.

    Replicated, the q heads are those of its DCP group.
    """
    shard = rank // (layout.tp_size // layout.attn_tp_size)
    width = max(1, kv_heads // layout.attn_tp_size)
    first = shard * kv_heads // layout.attn_tp_size
    if replicated:
        own_q = full["q"].chunk(layout.attn_tp_size)[shard]
    else:
        own_q = full["q"].chunk(layout.tp_size)[rank]
    k, v = (
        full[part].unflatten(0, (kv_heads, -1))[first : first + width].flatten(0, 1)
        for part in "kv"
    )
    return torch.cat([own_q, k, v])


def qkv_layer(
    heads: int, kv_heads: int, tp_rank: int, tp_size: int, v_dim: int, **more: Any
) -> Any:
    from sglang.srt.layers.linear import QKVParallelLinear

    # Later releases read rank and size from the context.
    names = inspect.signature(QKVParallelLinear.__init__.__wrapped__).parameters
    place = {"tp_rank": tp_rank, "tp_size": tp_size}
    given = {name: place[name] for name in place if name in names}
    with attention_width(tp_size, tp_rank):
        layer = QKVParallelLinear(
            *(HIDDEN, HEAD_DIM, heads, kv_heads),
            bias=True,
            v_head_size=v_dim,
            **given,
            **more,
        )
    for name in ("weight", "bias"):
        if hasattr(layer, name):
            getattr(layer, name).data.fill_(float("nan"))
    return layer


def dcp_layer(
    layout: Layout,
    heads: int,
    kv_heads: int,
    rank: int,
    v_dim: int,
    replicated: bool = False,
    **more: Any,
) -> Any:
    """As a model builds it: with the KV heads of the scaled model config."""
    clear_context()
    set_context(DcpContext(DcpConfig(layout, replicate_q_proj=replicated), rank))
    seen = kv_heads * layout.dcp_size
    return qkv_layer(heads, seen, rank, layout.tp_size, v_dim, **more)


@pytest.mark.parametrize("v_dim", [HEAD_DIM, 6], ids=["same-v", "wide-v"])
@Q_WIDTHS
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_rank_loads_its_heads(
    name: str, v_dim: int, replicated: bool, plugins: None
) -> None:
    layout, heads, kv_heads = LAYOUTS[name]
    weights = checkpoint(heads, kv_heads, v_dim, HIDDEN)
    biases = checkpoint(heads, kv_heads, v_dim)
    for rank in range(layout.tp_size):
        layer = dcp_layer(layout, heads, kv_heads, rank, v_dim, replicated)
        for part in "qkv":
            layer.weight.weight_loader(layer.weight, weights[part], part)
            layer.bias.weight_loader(layer.bias, biases[part], part)
        place = (layout, kv_heads, rank, replicated)
        assert torch.equal(layer.weight, by_hand(weights, *place))
        assert torch.equal(layer.bias, by_hand(biases, *place))


@Q_WIDTHS
@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_checkpoint(name: str, replicated: bool, plugins: None) -> None:
    """q, k and v in one tensor, which the loader cuts by its local head counts."""
    layout, heads, kv_heads = LAYOUTS[name]
    weights = checkpoint(heads, kv_heads, HEAD_DIM, HIDDEN)
    for rank in range(layout.tp_size):
        layer = dcp_layer(layout, heads, kv_heads, rank, HEAD_DIM, replicated)
        fused = torch.cat([weights[part] for part in "qkv"])
        layer.weight.weight_loader(layer.weight, fused)
        want = by_hand(weights, layout, kv_heads, rank, replicated)
        assert torch.equal(layer.weight, want)


@Q_WIDTHS
@pytest.mark.parametrize("name", LAYOUTS)
def test_gguf_rows(name: str, replicated: bool, plugins: None) -> None:
    """Blocks of bytes, which SGLang cuts by rank whether ranks share K/V heads or not."""
    from sglang.srt.layers.quantization.gguf import GGUFConfig

    layout, heads, kv_heads = LAYOUTS[name]
    weights = checkpoint(heads, kv_heads, HEAD_DIM, HIDDEN)
    for rank in range(layout.tp_size):
        quant = {"quant_config": GGUFConfig()}
        layer = dcp_layer(layout, heads, kv_heads, rank, HEAD_DIM, replicated, **quant)
        for part in "qkv":
            layer.qweight.weight_loader(layer.qweight, weights[part], part)
        taken = layer.qweight.data_container
        want = by_hand(weights, layout, kv_heads, rank, replicated)
        assert torch.equal(torch.cat(taken), want)


def cut_for_rank(layer: Any, full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The rows of B, [outputs, adapter rank], that SGLang gives to one rank."""
    from sglang.srt.lora.layers import QKVParallelLinearWithLoRA

    wrapped = without_pinned_memory(QKVParallelLinearWithLoRA, layer, None)
    if not hasattr(layer, "kv_tp_group"):  # until 0.5.22, the caller names the rank
        return wrapped.slice_lora_b_weights(full, rank)
    layer.tp_group = layer.kv_tp_group = SimpleNamespace(
        rank_in_group=rank, world_size=ranks
    )
    return wrapped.slice_lora_b_weights(full)


def buffer_rows(layout: Layout, heads: int, kv_heads: int) -> int:
    """Rows of B that SGLang's pool sets aside, as it reads the scaled model config."""
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    seen = kv_heads * layout.dcp_size
    config = SimpleNamespace(
        num_key_value_heads=seen, num_attention_heads=heads, head_dim=HEAD_DIM
    )
    pool = SimpleNamespace(base_hf_config=config)
    outputs = HEAD_DIM * (heads + 2 * seen)
    rows: int = LoRAMemoryPool._column_parallel_lora_b_per_rank_dim(
        pool, "qkv_proj", outputs, layout.tp_size
    )
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_b_go_where_rows_of_w_go(name: str, plugins: None) -> None:
    layout, heads, kv_heads = LAYOUTS[name]
    weights = checkpoint(heads, kv_heads, HEAD_DIM, HIDDEN)
    stacked = torch.cat([weights[part] for part in "qkv"])
    for rank in range(layout.tp_size):
        layer = dcp_layer(layout, heads, kv_heads, rank, HEAD_DIM)
        for part in "qkv":
            layer.weight.weight_loader(layer.weight, weights[part], part)
        got = cut_for_rank(layer, stacked, rank, layout.tp_size)
        assert torch.equal(got, layer.weight)
        assert len(got) == buffer_rows(layout, heads, kv_heads)


def test_without_dcp_the_layer_is_sglangs(plugins: None) -> None:
    weights = checkpoint(8, 4, HEAD_DIM, HIDDEN)
    layer = qkv_layer(8, 4, 3, 4, HEAD_DIM)
    for part in "qkv":
        layer.weight.weight_loader(layer.weight, weights[part], part)
    assert torch.equal(layer.weight, by_hand(weights, Layout(4, 4), 4, 3))
    assert (layer.total_num_kv_heads, layer.num_kv_head_replicas) == (4, 1)


def test_heads_that_bypass_the_scaled_config_are_found(plugins: None) -> None:
    set_context(DcpContext(DcpConfig(Layout(4, 1)), 0))
    with pytest.raises(RuntimeError, match="2 K/V heads .*scaled by 4"):
        qkv_layer(8, 2, 0, 4, HEAD_DIM)


@pytest.mark.parametrize(
    ("sizes", "local_kv_heads"),
    [
        pytest.param({"tp_size": 2, "dcp_size": 2}, 2, id="tp2-attn1"),
        pytest.param({"tp_size": 4, "dcp_size": 2}, 1, id="tp4-attn2"),
        pytest.param({"tp_size": 4, "dcp_size": 4}, 2, id="tp4-attn1"),
        pytest.param({"tp_size": 8, "attn_tp_size": 4}, 1, id="tp8-attn4-replicated"),
        pytest.param({"tp_size": 4}, 1, id="off"),
    ],
)
def test_every_reader_divides_by_tp(
    sizes: dict[str, int], local_kv_heads: int, server_args: Any
) -> None:
    """SGLang's own `ModelConfig` of a checkpoint with 8 and 2 heads, read repeatedly."""
    from sglang.srt.configs.model_config import ModelConfig

    args = server_args(**sizes)
    dcp_size = args.dcp.dcp_size if args.dcp else 1
    for model in (ModelConfig.from_server_args(args) for _ in range(3)):
        assert model.get_num_kv_heads(args.tp_size) == local_kv_heads
        assert model.get_total_num_kv_heads() == 2 * dcp_size
        assert model.num_key_value_heads == 2 * dcp_size
        assert model.hf_config.num_key_value_heads == 2 * dcp_size
        assert model.hf_text_config.num_attention_heads == 8
        if args.dcp:
            scale_kv_heads(model, args.dcp)
            assert model.get_total_num_kv_heads() == 2 * dcp_size


def test_mla_is_left_alone(server_args: Any, tmp_path: Any) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    path = str(make_tiny_model(tmp_path / "mla", "mla-dense"))
    args = server_args(model_path=path, tp_size=4, dcp_size=4)
    for _ in range(2):
        model = ModelConfig.from_server_args(args)
        assert model.hf_text_config.num_key_value_heads == 8
        assert model.num_key_value_heads == 8


def test_text_config_apart_from_the_models_own(plugins: None) -> None:
    """A multimodal config holds the count twice; one without a field gets none."""
    from sglang.srt.configs.model_config import AttentionArch

    text = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2)
    whole = SimpleNamespace(architectures=["LlamaForCausalLM"], text_config=text)
    model = SimpleNamespace(
        hf_config=whole,
        hf_text_config=text,
        num_key_value_heads=2,
        attention_arch=AttentionArch.MHA,
        is_hybrid_swa=False,
        has_attention_sinks=False,
        is_encoder_decoder=False,
        is_draft_model=False,
        quantization=None,
        get_total_num_kv_heads=lambda: text.num_key_value_heads,
    )
    before = copy.copy(whole)
    for _ in range(2):
        scale_kv_heads(model, DcpConfig(Layout(4, 2)))
        assert text.num_key_value_heads == model.num_key_value_heads == 4
        assert whole == before


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
