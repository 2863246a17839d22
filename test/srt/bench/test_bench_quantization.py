"""Quantized dummy weights of the benchmarks: what SGLang and DCP take them for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_decode
import bench_prefill
from decode_dummies import LARGEST, fill_fp8, fp8_dummies
from decode_models import write_model
from decode_quantization import BLOCK, QUANTIZATIONS, config_entries, flag_value
from live_servers import server_flags

# As `support.quantization.format_of` names them.
FORMATS = {
    "fp8": "fp8-online",
    "fp8-tensor": "fp8-tensor-dynamic",
    "fp8-block": "fp8-block",
}


def parsed(*words: str) -> Any:
    return bench_decode.parse(["x.csv", "--device", "cuda", *words])


@pytest.mark.parametrize("model", ["DeepSeek-V2-Lite", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_what_is_written_is_read_as_this_format(
    name: str, model: str, tmp_path: Path
) -> None:
    from sglang.srt.configs.model_config import ModelConfig

    from sglang_dcp.support.quantization import format_of

    write_model(tmp_path, model, 4096, config_entries(name))
    found = ModelConfig(str(tmp_path), quantization=flag_value(name), dtype="bfloat16")
    assert found.quantization == "fp8"
    assert format_of(found) == FORMATS[name]


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-block"])
def test_dummy_weights_are_fp8_with_scales(name: str) -> None:
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

    entries = config_entries(name)["quantization_config"]
    config = Fp8Config.from_config({**entries, "packed_modules_mapping": {}})
    layer = ReplicatedLinear(
        2 * BLOCK, 3 * BLOCK, bias=False, quant_config=config, prefix="some"
    )
    with torch.no_grad():
        initialize_dummy_weights(layer)
    found = dict(layer.named_parameters())
    assert found.pop("weight").dtype == torch.float8_e4m3fn
    [scale] = found.values()
    assert scale.shape == ((3, 2) if name == "fp8-block" else (1,))
    # A scale as it was made would be the least float.
    assert scale.isfinite().all() and scale.ne(0).all() and scale.abs().max() <= 1


def test_servers_and_engines_get_the_same_weights(tmp_path: Path) -> None:
    words = [str(tmp_path / "x.csv"), "--device", "cuda", "--tp", "2"]
    words += ["--model", "Qwen3-30B-A3B", "--quantization"]
    for name in QUANTIZATIONS:
        options = bench_prefill.parse([*words, name])
        flags = server_flags(options, options.plain)
        assert ("--quantization" in flags) == (name == "fp8")
        if name == "fp8":
            assert flags[flags.index("--quantization") + 1] == "fp8"
    assert flag_value(None) is None and config_entries(None) == {}


@pytest.mark.parametrize(
    "model, tp, said",
    [
        ("DeepSeek-V2-Lite", 2, "5472 columns of a dense layer"),
        # Cut in no way, and 10944 is 85.5 blocks still.
        ("DeepSeek-V2-Lite", 1, "10944 columns of a dense layer"),
        ("Qwen3-30B-A3B", 4, "192 columns of an expert"),
        ("Qwen3-30B-A3B/4", 2, "96 columns of an expert"),
        ("Qwen2.5-3B", 4, "2752 columns of a dense layer"),
        ("tiny", 4, "64 query columns"),
    ],
)
def test_blocks_that_cannot_be_cut_are_refused(
    model: str, tp: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", model, "--tp", str(tp), "--quantization")
    with pytest.raises(SystemExit):
        parsed(*words, "fp8-block")
    assert said in capsys.readouterr().err
    for name in ("fp8", "fp8-tensor"):
        assert parsed(*words, name).quantization == name


@pytest.mark.parametrize(
    "model, tp", [("Qwen3-30B-A3B", 2), ("Qwen2.5-3B", 2), ("Qwen2.5-7B", 4)]
)
def test_blocks_that_can_be_cut(model: str, tp: int) -> None:
    words = ("--model", model, "--tp", str(tp), "--quantization", "fp8-block")
    assert parsed(*words).quantization == "fp8-block"


class Layer(torch.nn.Module):
    """A layer as SGLang builds it: FP8 weights, a scale, and a norm in bf16."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    norm: torch.Tensor

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.weight = self._parameter(torch.zeros(64, 32).to(torch.float8_e4m3fn))
        self.norm = self._parameter(torch.ones(32, dtype=torch.bfloat16))
        setattr(self, scale, self._parameter(torch.ones(2)))

    @staticmethod
    def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(value, requires_grad=False)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_fp8_dummies_are_as_large_as_others(scale: str) -> None:
    one, two = Layer(scale), Layer(scale)
    for layer in (one, two):
        fill_fp8(layer)
        drawn = layer.weight.float() * getattr(layer, scale)[0]
        assert (drawn != 0).float().mean() > 0.95
        assert 0.8 * LARGEST < drawn.abs().max() <= LARGEST
        assert layer.norm.eq(1).all()
    assert torch.equal(one.weight.float(), two.weight.float())


def test_the_dummy_loader_draws_them() -> None:
    from sglang.srt.model_loader import loader

    before, layer = loader.initialize_dummy_weights, Layer("weight_scale")
    with fp8_dummies():
        loader.initialize_dummy_weights(layer)
    assert loader.initialize_dummy_weights is before
    assert (layer.weight.float() != 0).float().mean() > 0.95
    assert layer.norm.ne(1).any() and layer.weight_scale.eq(LARGEST).all()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
