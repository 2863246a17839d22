"""Quantized QKV and Q projections: what each rank's layer stands for after loading.

Only this file loads every format through SGLang's own layers for each rank of many layouts,
and compares weights and scales with rows of the checkpoint. Kernels do not run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.quantized import FORMATS, ONLINE_FP8, Format
from helpers.quantized_layers import (
    Place,
    build_as_on_hopper,
    load,
    quant_config,
    read_back,
)
from sglang_dcp.context import clear_context, get_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.q_replication import replicate_q_projections
from sglang_dcp.releases.installed import in_range, sglang_version

HIDDEN, HEAD_DIM = 256, 128
SERVES_REPLICAS = in_range(sglang_version(), "0.5.23", None)
LAYOUTS = {
    "tp2-attn1-2kv": (Layout(2, 1), 4, 2),
    "tp4-attn2": (Layout(4, 2), 8, 2),
    "tp4-attn2-replicated-kv": (Layout(4, 2), 8, 1),
    "tp6-attn2-dcp3": (Layout(6, 2), 6, 2),
}
ALL = {**FORMATS, "fp8-online": ONLINE_FP8}


@pytest.fixture(autouse=True)
def hopper(plugins: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    build_as_on_hopper(monkeypatch)
    yield
    clear_context()


def matrix(rows: int, seed: int) -> torch.Tensor:
    """Each row has a magnitude of its own, so that no other row's scale fits it."""
    gen = torch.Generator().manual_seed(seed)
    sizes = torch.rand(rows, 1, generator=gen) + 0.1
    # fp16 holds it exactly, as a checkpoint in 16 bit does.
    return (torch.randn(rows, HIDDEN, generator=gen) * sizes).half().float()


@functools.cache
def parts_of(name: str, heads: int, kv_heads: int) -> tuple[Any, Any]:
    """The checkpoint of Q, K and V by part, and what it stands for."""
    form, rows = ALL[name], {"q": heads, "k": kv_heads, "v": kv_heads}
    checkpoint = {
        part: form.quantize(matrix(count * HEAD_DIM, seed))
        for seed, (part, count) in enumerate(rows.items())
    }
    return checkpoint, {part: form.dequantize(t) for part, t in checkpoint.items()}


def heads_of(whole: torch.Tensor, first: int, count: int) -> torch.Tensor:
    return whole[first * HEAD_DIM : (first + count) * HEAD_DIM]


def named_layouts() -> Iterator[object]:
    """CI has time for each format in one layout, and for each layout of one format."""
    for name in ALL:
        for layout in LAYOUTS:
            long = name != "fp8-block" and layout != "tp4-attn2"
            yield pytest.param(name, layout, marks=[pytest.mark.long] * long)


@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "replicated"])
@pytest.mark.parametrize(("name", "layout"), named_layouts())
def test_qkv_layer_holds_its_heads(name: str, layout: str, replicated: bool) -> None:
    form, (sizes, heads, kv_heads) = ALL[name], LAYOUTS[layout]
    checkpoint, wanted = parts_of(name, heads, kv_heads)
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


class Attention(torch.nn.Module):
    """What `replicate_q_projections` knows of DeepSeek's attention."""

    w_kc = None

    def __init__(self, place: Place, form: Format, lora: bool) -> None:
        super().__init__()
        self.q_lora_rank = HIDDEN if lora else None
        self.name = "q_b_proj" if lora else "q_proj"
        layer = place.column_layer(form, HIDDEN, 8 * HEAD_DIM, self.name)
        self.add_module(self.name, layer)
        self.kv_b_proj = place.column_layer(form, HIDDEN, 8 * HEAD_DIM, "kv_b_proj")

    def forward_absorb_prepare(self) -> None: ...


def model_of(place: Place, form: Format, lora: bool = True) -> Any:
    """Names of modules are as in a model, and so are the prefixes of its layers."""
    block = torch.nn.ModuleDict({"self_attn": Attention(place, form, lora)})
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])})
    return torch.nn.ModuleDict({"model": layers})


def rebuilt(place: Place, model: Any) -> Any:
    with place.width():
        replicate_q_projections(model, get_context())
    return model["model"]["layers"][0]["self_attn"]


@pytest.mark.parametrize("lora", [True, False], ids=["q_b", "q"])
@pytest.mark.parametrize("name", ALL)
def test_q_of_mla_holds_the_heads_of_its_group(name: str, lora: bool) -> None:
    form, layout = ALL[name], Layout(4, 2)
    checkpoint = form.quantize(matrix(8 * HEAD_DIM, 7))
    wanted = form.dequantize(checkpoint)
    for rank in range(4):
        place = Place(layout, rank, True)
        attention = rebuilt(place, model_of(place, form, lora))
        layer = getattr(attention, attention.name)
        load(layer, checkpoint)
        got = read_back(form, layer)
        torch.testing.assert_close(got, wanted.chunk(2)[rank // 2], rtol=1e-3, atol=0)
        assert attention.kv_b_proj.output_size_per_partition == 2 * HEAD_DIM


# Formats whose weights a CPU can process.
@pytest.mark.skipif(not SERVES_REPLICAS, reason="0.5.16 was not tried")
@pytest.mark.parametrize(
    "name", ["fp8-block", "fp8-channel", "int8-channel", "fp8-online"]
)
def test_new_weights_of_a_layer_that_sglang_processed(name: str) -> None:
    """As they come over IPC. SGLang itself has no loader for tensors that it replaced."""
    form, (sizes, heads, kv_heads) = ALL[name], LAYOUTS["tp4-attn2"]
    layer = Place(sizes, 3, True).qkv_layer(form, HIDDEN, HEAD_DIM, heads, kv_heads)
    old, _ = parts_of(name, heads, kv_heads)
    for part, tensors in old.items():
        load(layer, tensors, part)
    layer.quant_method.process_weights_after_loading(layer)
    places = [p.data_ptr() for p in layer.parameters()]
    rows = {"q": heads, "k": kv_heads, "v": kv_heads}
    new = {p: form.quantize(matrix(n * HEAD_DIM, 9)) for p, n in rows.items()}
    if name != "fp8-block":
        with pytest.raises(AttributeError, match="no attribute 'weight_loader'"):
            load(layer, new["q"], "q")
        return
    for part, tensors in new.items():
        load(layer, tensors, part)
    layer.quant_method.process_weights_after_loading(layer)
    assert [p.data_ptr() for p in layer.parameters()] == places
    wanted = [form.dequantize(t).chunk(2)[1] for t in new.values()]
    torch.testing.assert_close(
        read_back(form, layer), torch.cat(wanted), rtol=1e-3, atol=0
    )


@pytest.mark.skipif(not SERVES_REPLICAS, reason="DCP refuses DP attention there")
@pytest.mark.parametrize("replicated", [False, True], ids=["sharded", "replicated"])
def test_layers_of_a_replica_of_dp_attention(replicated: bool) -> None:
    """Its ranks alone share the heads, as if the others were not there."""
    name, layout = "fp8-block", Layout(4, 2, replicas=2)
    form, (checkpoint, wanted) = ALL[name], parts_of(name, 8, 2)
    for rank in range(4):
        place = Place(layout, rank, replicated)
        layer = place.qkv_layer(form, HIDDEN, HEAD_DIM, 8, 2)
        for part, tensors in checkpoint.items():
            load(layer, tensors, part)
        q = (
            wanted["q"].chunk(2)[rank // 2]
            if replicated
            else wanted["q"].chunk(4)[rank]
        )
        kv = [wanted[part].chunk(2)[rank // 2] for part in "kv"]
        got = read_back(form, layer)
        torch.testing.assert_close(got, torch.cat([q, *kv]), rtol=1e-3, atol=0)
        if replicated:
            q_b = rebuilt(place, model_of(place, form)).q_b_proj
            load(q_b, checkpoint["q"])
            torch.testing.assert_close(read_back(form, q_b), q, rtol=1e-3, atol=0)


def test_a_layer_left_in_16_bit_stays_so() -> None:
    """It is left out by its name, which the wider layer must keep."""
    form = FORMATS["fp8-block"]
    assert form.config is not None
    name = "model.layers.0.self_attn.q_b_proj"
    config = {**form.config, "ignored_layers": [name]}
    place = Place(Layout(2, 1), 0, True)
    attention = rebuilt(place, model_of(place, replace(form, config=config)))
    assert attention.q_b_proj.weight.dtype == torch.float16
    assert attention.q_b_proj.weight.shape == (8 * HEAD_DIM, HIDDEN)
    assert attention.kv_b_proj.weight.dtype == torch.float8_e4m3fn


def test_a_layer_that_changes_its_format_is_an_error() -> None:
    form = FORMATS["fp8-block"]
    place = Place(Layout(2, 1), 0, True)
    model = model_of(place, form)
    attention = model["model"]["layers"][0]["self_attn"]
    attention.q_b_proj.quant_config = quant_config(FORMATS["fp8-tensor"])
    with pytest.raises(RuntimeError, match="self_attn.q_b_proj became .*was"):
        rebuilt(place, model)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
