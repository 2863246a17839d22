"""Quantized QKV and Q projections: what each rank's layer stands for after loading.

Only this file loads every format through SGLang's own layers for each rank of many layouts,
and compares weights and scales with rows of the checkpoint. Kernels do not run.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from helpers.quantized import FORMATS, ONLINE_FP8, Format
from helpers.quantized_layers import Place, load, read_back
from sglang_dcp.context import clear_context
from sglang_dcp.distributed.topology import Layout

HIDDEN, HEAD_DIM = 256, 128
LAYOUTS = {
    "tp2-attn1": (Layout(2, 1), 4, 1),
    "tp2-attn1-2kv": (Layout(2, 1), 4, 2),
    "tp4-attn2": (Layout(4, 2), 8, 2),
    "tp4-attn2-4kv": (Layout(4, 2), 8, 4),
    "tp4-attn2-replicated-kv": (Layout(4, 2), 8, 1),
    "tp6-attn2-dcp3": (Layout(6, 2), 6, 2),
}
ALL = {**FORMATS, "fp8-online": ONLINE_FP8}


@pytest.fixture(autouse=True)
def no_context(plugins: None) -> Any:
    yield
    clear_context()


def matrix(rows: int, seed: int) -> torch.Tensor:
    """Each row has a magnitude of its own, so that no other row's scale fits it."""
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=gen) + 0.1
    # fp16 holds it exactly, as a checkpoint in 16 bit does.
    return (torch.randn(rows, HIDDEN, generator=gen) * sizes).half().float()


def parts_of(form: Format, heads: int, kv_heads: int) -> dict[str, Any]:
    rows = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        part: form.quantize(matrix(count * HEAD_DIM, seed))
        for seed, (part, count) in enumerate(rows.items())
    }


def heads_of(whole: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return whole[first * HEAD_DIM : (first + count) * HEAD_DIM]


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "replicated"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_qkv_layer_holds_its_heads(name: str, layout: str, replicated: bool) -> None:
    form, (sizes, heads, kv_heads) = ALL[name], LAYOUTS[layout]
    checkpoint = parts_of(form, heads, kv_heads)
    wanted = {part: form.dequantize(found) for part, found in checkpoint.items()}
    width = sizes.attn_tp_size if replicated else sizes.tp_size
    for rank in range(sizes.tp_size):
        place = Place(sizes, rank, replicated)
        layer = place.qkv_layer(form, HIDDEN, HEAD_DIM, heads, kv_heads)
        for part, tensors in checkpoint.items():
            load(layer, tensors, part)
        held = sizes.kv_shard(kv_heads, rank)
        first = (sizes.attn_tp_rank(rank) if replicated else rank) * heads // width
        q = heads_of(wanted["q"], first, heads // width)
        kv = [heads_of(wanted[part], held.start, len(held)) for part in "kv"]
        got = read_back(form, layer)
        torch.testing.assert_close(got, torch.cat([q, *kv]), rtol=1e-3, atol=0)
        assert layer.total_num_kv_heads == kv_heads


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
