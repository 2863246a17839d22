"""What is refused once SGLang has built a model: by its attention layers, not by a name."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.support.attention_layers import check_attention_layers

HEADS, KV_HEADS, DIM = 8, 2, 4
LAYOUT = Layout(4, 2)


def qkv_layer(heads: int, kv_heads: int) -> nn.Module:
    from sglang.srt.layers.linear import QKVParallelLinear

    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    nn.Module.__init__(layer)
    layer.total_num_heads, layer.total_num_kv_heads = heads, kv_heads
    return layer


def attention(
    kv_heads: int = KV_HEADS, q_heads: int = HEADS // 4, **changes: Any
) -> Any:
    from sglang.srt.layers.radix_attention import RadixAttention

    module: Any = nn.Module()
    module.qkv_proj = qkv_layer(HEADS, kv_heads)
    module.q_size = q_heads * DIM
    local = changes.pop("local", 1)
    module.attn = RadixAttention(q_heads, DIM, 1.0, local, 0, **changes)
    return module


def without_qkv() -> nn.Module:
    module = attention()
    del module.qkv_proj
    module.k_proj = nn.Linear(3, 3)
    return module


def with_norm(size: int, *, cut: bool = False) -> nn.Module:
    module: Any = attention()
    module.k_norm = nn.RMSNorm(size)
    if cut:
        setattr(module.k_norm.weight, "weight_loader", torch.Tensor.copy_)
    return module


def check(
    *layers: nn.Module, layout: Layout = LAYOUT, replicate: bool = False, count: int = 1
) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    dcp = layout.dcp_size
    text = SimpleNamespace(
        num_attention_heads=HEADS, num_hidden_layers=count, dcp_kv_head_scale=dcp
    )
    model_config = SimpleNamespace(
        attention_arch=AttentionArch.MHA,
        hf_config=text,
        hf_text_config=text,
        quantization=None,
        is_draft_model=False,
        get_total_num_kv_heads=lambda: KV_HEADS * dcp,
    )
    config = DcpConfig(layout, replicate_q_proj=replicate)
    check_attention_layers(nn.Sequential(*layers), model_config, config)


def special(**changes: Any) -> Any:
    return lambda: attention(**changes)


def encoder_attention() -> nn.Module:
    from sglang.srt.layers.radix_attention import AttentionType

    return attention(attn_type=AttentionType.ENCODER_ONLY)


def test_what_fits_the_layout_passes() -> None:
    check(attention(), attention(), count=2)
    check(with_norm(DIM), replicate=True)
    check(with_norm(KV_HEADS * DIM * 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (special(sliding_window_size=64), "0.attn with sliding_window_size 64"),
        (special(is_cross_attention=True), "0.attn with cross attention"),
        (special(logit_cap=30.0), "0.attn with logit_cap 30.0"),
        (encoder_attention, "0.attn with attn_type encoder_only"),
        # MHA that cuts K/V heads by the number of query heads.
        (special(kv_heads=HEADS // 2, local=2), r"heads \(2, 2, 2\).*\(2, 1, 1\)"),
        (special(kv_heads=HEADS), "QKV layer with 8 K/V heads.*config names 2"),
        (special(q_heads=HEADS), r"heads \(8, 1, 1\)"),
        (without_qkv, "0.attn.*from no QKV layer"),
        (nn.Module, "0 attention layers.*not go through SGLang's layers"),
    ],
)
def test_what_does_not_is_refused(make: Any, message: str) -> None:
    with pytest.raises(DcpConfigError, match=message) as caught:
        check(make())
    assert str(caught.value).startswith("--model-path Sequential (")
    assert str(caught.value).endswith("; serve this model without DCP")


@pytest.mark.parametrize("size, cut", [(KV_HEADS * DIM * 2, False), (DIM, True)])
def test_replicated_q_with_norms_over_heads(size: int, cut: bool) -> None:
    check(with_norm(size, cut=cut))
    with pytest.raises(DcpConfigError, match="^--dcp-replicate-q-proj with Sequential"):
        check(with_norm(size, cut=cut), replicate=True)


class Kernel:
    """A linear method that SGLang may give to a single layer."""


def test_replicated_q_of_one_quantized_layer() -> None:
    """The model config names no format, so only the layer tells."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    plain: Any = attention()
    quantized: Any = attention()
    for module, kind in ((plain, UnquantizedLinearMethod), (quantized, Kernel)):
        layer = module.qkv_proj
        layer.quant_method = kind()
        layer.weight = nn.Parameter(torch.empty(3, 3, device="meta"))
    check(quantized)
    check(plain, replicate=True)
    with pytest.raises(DcpConfigError, match="q-proj with 1.qkv_proj by Kernel does"):
        check(plain, quantized, replicate=True, count=2)
    # Kernels of CPUs are not waited for.
    quantized.qkv_proj.weight = nn.Parameter(torch.empty(3, 3))
    check(quantized, replicate=True)


def test_a_norm_over_all_heads_needs_each_head_once() -> None:
    layer: Any = with_norm(KV_HEADS * DIM * 2)
    layer.attn.tp_q_head_num = 1
    with pytest.raises(DcpConfigError, match="--attn-tp-size 4 .*use --attn-tp-size 2"):
        check(layer, layout=Layout(8, 4))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
