"""What SGLang itself cannot serve of a quantized checkpoint is named before its weights.

Only this file reads the lists of modules left in 16 bit, in the words of each format.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import AttentionArch

from helpers.quantized import FORMATS
from helpers.quantized_checkpoint import (
    NOT_FOR_LATENTS,
    left_in_16_bit,
    quantization_config,
)
from sglang_dcp.support import quantized_layers
from sglang_dcp.support.quantized_layers import int8_experts, packed_latents

# SGLang's name for a format, where config.json has another.
SERVED_AS = {"awq": "awq_marlin", "gptq": "gptq_marlin", "modelopt": "modelopt_fp8"}
LAST = "model.layers.3.self_attn.kv_b_proj"


def model(
    config: dict[str, Any], quantization: str = "", *, mla: bool = True, **text: Any
) -> Any:
    """A model of four layers."""
    method = config.get("quant_method", "")
    return SimpleNamespace(
        quantization=quantization or SERVED_AS.get(method, method),
        attention_arch=AttentionArch.MLA if mla else AttentionArch.MHA,
        hf_config=SimpleNamespace(quantization_config=config),
        hf_text_config=SimpleNamespace(num_hidden_layers=4, **text),
    )


def with_experts(
    name: str, number: Any, config: dict[str, Any], quantization: str = ""
) -> Any:
    """A model that calls its number of experts `name`."""
    found = model(config, quantization)
    setattr(found.hf_text_config, name, number)
    return found


def config_of(name: str, **more: Any) -> dict[str, Any]:
    return {**(FORMATS[name].config or {}), **more}


@pytest.mark.parametrize("release", ["0.5.16", "0.5.23"])
@pytest.mark.parametrize("name", FORMATS)
def test_latents_of_each_format(
    name: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layers, "sglang_version", lambda: release)
    found = packed_latents(model(config_of(name)))
    refused = name in NOT_FOR_LATENTS or (name, release) == ("awq", "0.5.23")
    assert (found is not None) == refused
    assert packed_latents(model(config_of(name), mla=False)) is None


def test_latents_that_were_packed_by_another_name() -> None:
    assert packed_latents(model({}, "gguf")) == "gguf kv_b_proj"
    assert packed_latents(model(config_of("gptq"), "moe_wna16")) == "gptq kv_b_proj"
    # New tensors of 16-bit weights.
    assert packed_latents(model({}, "moe_wna16")) is None


# As checkpoints on the Hugging Face hub have them, but for what does not count here.
KIMI_K2_W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"type": "int", "num_bits": 4, "strategy": "group"},
        }
    },
}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": {"type": "int", "strategy": "token"},
            "weights": {"type": "int", "num_bits": 8, "strategy": "channel"},
        }
    },
}


def test_checkpoints_of_others() -> None:
    assert packed_latents(model(KIMI_K2_W4A16)) is None
    all_packed = {**KIMI_K2_W4A16, "ignore": ["lm_head"]}
    assert packed_latents(model(all_packed)) == "compressed-tensors kv_b_proj"
    # SGLang then serves all other layers in fp8.
    assert packed_latents(model({**all_packed, "linear_fp8_config": {"a": 1}})) is None
    assert int8_experts(model(INT8)) is None
    assert int8_experts(with_experts("moe_num_experts", 8, INT8)) is not None
    by_name = [f"model.layers.3.block_sparse_moe.experts.{i}.w1" for i in range(8)]
    left = {**INT8, "ignore": by_name}
    assert int8_experts(with_experts("num_local_experts", 8, left)) is None


@pytest.mark.parametrize("name", NOT_FOR_LATENTS)
def test_the_tests_own_checkpoints_leave_them_in_16_bit(name: str) -> None:
    left = left_in_16_bit("mla-v3", name)
    assert packed_latents(model(quantization_config(FORMATS[name], left))) is None


@pytest.mark.parametrize(
    ("name", "more", "refused"),
    [
        ("gptq", {"dynamic": {r"-:.*self_attn\..*": {}}}, False),
        ("gptq", {"dynamic": {r"+:.*kv_b_proj": {"bits": 8}}}, True),
        ("gptq", {"dynamic": {r"-:.*mlp.*": {}}}, True),
        ("gptq", {"dynamic": None, "modules_to_not_convert": None}, True),
        ("gptq", {"modules_to_not_convert": ["self_attn"]}, False),
        ("awq", {"modules_to_not_convert": ["kv_b_proj"]}, False),
        ("awq", {"modules_to_not_convert": ["lm_head", "mlp.gate"]}, True),
        ("w4a16", {"ignore": ["re:.*self_attn.*", "lm_head"]}, False),
        ("w4a16", {"ignore": ["lm_head", LAST]}, False),
        # Of another layer.
        ("w4a16", {"ignore": [LAST.replace("3", "0")]}, True),
        ("w4a16", {"format": "mixed-precision"}, False),
    ],
    ids=str,
)
def test_modules_left_in_16_bit(
    name: str, more: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_layers, "sglang_version", lambda: "0.5.23")
    found = packed_latents(model(config_of(name, **more)))
    assert (found is not None) == refused


@pytest.mark.parametrize(
    "experts", ["num_experts", "num_local_experts", "n_routed_experts"]
)
def test_int8_experts(experts: str) -> None:
    int8 = config_of("int8-channel")
    assert int8_experts(with_experts(experts, 8, int8)) == "INT8 experts"
    assert int8_experts(with_experts(experts, None, int8)) is None
    for left in ("re:.*experts.*", "model.layers.3.mlp.experts.0.up_proj"):
        config = {**int8, "ignore": [left]}
        assert int8_experts(with_experts(experts, 8, config)) is None
    for name in sorted({*FORMATS} - {"int8-channel"}):
        assert int8_experts(with_experts(experts, 8, config_of(name))) is None
    # SGLang has experts of its own for these.
    assert int8_experts(with_experts(experts, 8, {}, "w8a8_int8")) is None


def test_int8_weights_without_activations() -> None:
    """SGLang takes them for packed weights, and has experts for those."""
    int8 = config_of("int8-channel")
    group = {**int8["config_groups"]["group_0"], "input_activations": None}
    config = {**int8, "config_groups": {"group_0": group}}
    assert int8_experts(model(config, num_experts=8)) is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
