"""The test helpers' formats: each stores what its reader takes it for.

Only this file compares the tests' own quantizers with readers of others: SGLang's, and the
library of compressed-tensors. An error that a quantizer and its inverse share would hide.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.doors import with_door
from helpers.quantized import FORMATS, GROUP, pack, unpack
from helpers.quantized_checkpoint import QUANTIZED_KINDS, make_quantized, tiny_model
from sglang_dcp.config import DcpConfigError
from sglang_dcp.support import quantization

# More layers, and no other code.
MORE_KINDS = sorted({*QUANTIZED_KINDS} - {"qwen3-2kv"})
# Of the largest number of a block, group or row that shares a scale.
ROUNDING = {
    "fp8": 1 / 16,
    "int8": 1 / 254,
    "awq": 1 / 14,
    "gptq": 1 / 13,
    "w4a16": 1 / 13,
}


def matrix(rows: int, cols: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(5)
    return torch.randn(rows, cols, generator=gen) * torch.rand(rows, 1, generator=gen)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [256, 72])
def test_round_trip(name: str, rows: int) -> None:
    form, weight = FORMATS[name], matrix(rows, 256)
    stored = form.quantize(weight)
    found = form.dequantize(stored)
    assert found.shape == weight.shape and found.dtype == torch.float64
    far = (found - weight).abs().max() / weight.abs().max()
    assert far < ROUNDING[name.split("-")[0]]
    # What was rounded once is not rounded again, except that a scale is found anew.
    again = form.dequantize(form.quantize(found.float()))
    torch.testing.assert_close(
        again, found, rtol=0.02, atol=float(weight.abs().max()) / 40
    )


@pytest.mark.parametrize("attention", ["MHA", "MLA"])
@pytest.mark.parametrize("name", FORMATS)
def test_door_for_replicated_q(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with the plugin takes the checkpoint, and one without does not."""
    from sglang.srt.configs.model_config import AttentionArch

    config = dict(FORMATS[name].config or {})
    model = SimpleNamespace(
        quantization=config["quant_method"],
        hf_config=SimpleNamespace(quantization_config=config),
        attention_arch=AttentionArch[attention],
    )
    none: frozenset[str] = frozenset()
    monkeypatch.setattr(quantization, "sglang_version", lambda: "0.5.23")
    monkeypatch.setattr(quantization, "MLA_PASSED", none)
    monkeypatch.setattr(quantization, "GQA_PASSED", none)
    with pytest.raises(DcpConfigError):
        quantization.check_replicated_q(model, "cuda")
    plugin: dict[str, Any] = {}
    source = "def load():\n    loaded.append(1)\nloaded = []"
    exec(with_door(source, "replication_door"), plugin)
    plugin["load"]()
    assert plugin["loaded"] == [1]
    quantization.check_replicated_q(model, "cuda")


@pytest.mark.parametrize("order", [tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)])
@pytest.mark.parametrize("dim", [0, 1])
def test_packed_words(dim: int, order: tuple[int, ...]) -> None:
    numbers = torch.arange(16 * 24).view(16, 24) * 7 % 16
    assert torch.equal(unpack(pack(numbers, dim, order), dim, order), numbers)


def test_fp8_blocks_as_sglang_reads_them(plugins: None) -> None:
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    stored = FORMATS["fp8-block"].quantize(matrix(256, 256))
    theirs = block_quant_dequant(
        stored["weight"], stored["weight_scale_inv"], [128, 128], torch.float32
    )
    ours = FORMATS["fp8-block"].dequantize(stored)
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-6, atol=0)


def test_awq_as_sglang_reads_it(plugins: None) -> None:
    """Its formula for NPUs needs no kernel."""
    from sglang.kernels.ops.quantization.awq_triton import awq_dequantize_decomposition

    stored = FORMATS["awq"].quantize(matrix(64, 256))
    theirs = awq_dequantize_decomposition(
        stored["qweight"], stored["scales"], stored["qzeros"]
    )
    ours = FORMATS["awq"].dequantize(stored).T
    torch.testing.assert_close(theirs.double(), ours, rtol=2e-3, atol=1e-4)


def test_w4a16_as_its_library_reads_it() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        unpack_from_int32,
    )

    stored = FORMATS["w4a16"].quantize(matrix(64, 256))
    shape = torch.Size(stored["weight_shape"].tolist())
    numbers = unpack_from_int32(stored["weight_packed"], 4, shape).double()
    scales = stored["weight_scale"].double().repeat_interleave(GROUP, 1)
    torch.testing.assert_close(numbers * scales, FORMATS["w4a16"].dequantize(stored))


@pytest.mark.parametrize(
    "kind",
    ["qwen3-2kv", *(pytest.param(k, marks=pytest.mark.long) for k in MORE_KINDS)],
)
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    """What it stands for is the tiny model, but for its rounding; names are kept."""
    plain = load_file(tiny_model(tmp_path / "plain", kind) / "model.safetensors")
    form = FORMATS["fp8-block"]
    path = make_quantized(tmp_path / "quantized", kind, "fp8-block")
    stored = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    quantized = [name for name in stored if name.endswith(".weight_scale_inv")]
    for name in quantized:
        stem = name.removesuffix(".weight_scale_inv")
        parts = {
            key.removeprefix(f"{stem}."): stored.pop(key)
            for key in [*stored]
            if key.startswith(f"{stem}.")
        }
        want = plain.pop(f"{stem}.weight").double()
        assert all(size % 64 == 0 for size in want.shape), (stem, want.shape)
        far = (form.dequantize(parts) - want).abs().max() / want.abs().max()
        assert far < 1 / 16, stem
    assert any("experts" in name for name in quantized) == (kind != "qwen3-2kv")
    for name, tensor in stored.items():
        torch.testing.assert_close(
            tensor.float(), plain.pop(name), rtol=1e-2, atol=1e-2
        )
    assert not plain
    left = {name.rsplit(".", 2)[1] for name in stored}
    assert not left & {"q_proj", "k_proj", "kv_b_proj", "gate_up_proj", "o_proj"}
    # The same call keeps what is there.
    assert make_quantized(path, kind, "fp8-block") == path


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].skip])
def test_modules_left_out_are_named(name: str, tmp_path: Path) -> None:
    path = make_quantized(tmp_path / "it", "qwen3-2kv", name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config[FORMATS[name].skip]
    assert replace(FORMATS[name], skip="").config == FORMATS[name].config


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
