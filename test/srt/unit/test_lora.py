"""LoRA adapters that are refused, by each way in which SGLang chooses their layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.config import DcpConfigError
from sglang_dcp.support.lora import check_adapters_of, check_adapters_of_latents


def plain(paths: dict[str, str]) -> list[str]:
    return list(paths.values())


def with_names(paths: dict[str, str]) -> list[str]:
    return [f"{name}={path}" for name, path in paths.items()]


def as_dicts(paths: dict[str, str]) -> list[dict[str, str]]:
    return [{"lora_name": name, "lora_path": path} for name, path in paths.items()]


def as_refs(paths: dict[str, str]) -> list[Any]:
    return [SimpleNamespace(**entry) for entry in as_dicts(paths)]


def adapters(
    folder: Path,
    *,
    form: Callable[[dict[str, str]], Any] = as_refs,
    given: Any = None,
    enable_lora: Any = None,
    **targets: Any,
) -> SimpleNamespace:
    """Server arguments with one adapter for each of `targets`."""
    paths = {}
    for name, modules in targets.items():
        (folder / name).mkdir()
        config = {"target_modules": modules, "r": 4, "lora_alpha": 4}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        paths[name] = str(folder / name)
    return SimpleNamespace(
        enable_lora=enable_lora, lora_target_modules=given, lora_paths=form(paths)
    )


@pytest.mark.parametrize("form", [plain, with_names, as_dicts, as_refs, dict])
def test_every_form_of_the_paths_is_read(
    form: Callable[[dict[str, str]], Any], tmp_path: Path, plugins: None
) -> None:
    args = adapters(tmp_path, form=form, one=["o_proj"], two=["kv_b_proj"])
    with pytest.raises(DcpConfigError, match="^--lora-paths .*two for kv_b_proj does"):
        check_adapters_of_latents(args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"given": {"o_proj", "kv_b_proj"}, "enable_lora": True},
            "--lora-target-modules kv_b_proj o_proj ",
        ),
        ({"given": ["all"], "enable_lora": True}, "--lora-target-modules all "),
        ({"one": ["o_proj"], "two": ["kv_b_proj"]}, "--lora-paths two for kv_b_proj "),
        ({"one": ["self_attn.kv_b_proj"]}, "--lora-paths one for kv_b_proj "),
        ({"one": "all-linear"}, "--lora-paths one for kv_b_proj "),
    ],
    ids=["module", "all-modules", "second-path", "prefixed", "all-linear"],
)
def test_adapters_of_latents_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, plugins: None
) -> None:
    with pytest.raises(DcpConfigError) as caught:
        check_adapters_of_latents(adapters(tmp_path, **arguments))
    assert str(caught.value).startswith(f"{message}does not work with DCP: a prefill ")


@pytest.mark.parametrize(
    "arguments",
    [
        {"one": ["q_b_proj", "o_proj"]},
        {"given": {"q_b_proj"}, "one": "all-linear"},
        {"enable_lora": False, "one": ["kv_b_proj"]},
        {"given": {"kv_b_proj"}},
    ],
    ids=["other-layers", "layers-chosen", "off-by-name", "off"],
)
def test_other_adapters_are_not_refused(
    arguments: dict[str, Any], tmp_path: Path, plugins: None
) -> None:
    check_adapters_of_latents(adapters(tmp_path, **arguments))


def model(quantization: Any = None, **text: Any) -> SimpleNamespace:
    """What is read of a `ModelConfig`."""
    return SimpleNamespace(
        quantization=quantization,
        hf_text_config=SimpleNamespace(**text),
        hf_config=SimpleNamespace(quantization_config=None),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"one": ["q_proj"]}, "--lora-paths with gguf weights "),
        (
            {"given": {"q_proj"}, "enable_lora": True},
            "--enable-lora with gguf weights ",
        ),
    ],
    ids=["paths", "flag"],
)
def test_adapters_of_quantized_weights_are_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, plugins: None
) -> None:
    args = adapters(tmp_path, **arguments)
    check_adapters_of(args, model())
    with pytest.raises(DcpConfigError) as caught:
        check_adapters_of(args, model("gguf"))
    assert str(caught.value).startswith(f"{message}does not work with DCP: no server ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"one": ["o_proj"], "two": ["down_proj"]}, "--lora-paths two for experts "),
        ({"one": ["mlp.gate_proj"]}, "--lora-paths one for experts "),
        ({"one": "all-linear"}, "--lora-paths one for experts "),
        ({"given": ["all"], "enable_lora": True}, "--lora-target-modules all "),
        (
            {"given": {"o_proj", "gate_up_proj"}, "enable_lora": True},
            "--lora-target-modules gate_up_proj o_proj ",
        ),
    ],
    ids=["second-path", "prefixed", "all-linear", "all-modules", "module"],
)
@pytest.mark.parametrize("number", ["num_experts", "n_routed_experts"])
def test_adapters_of_experts_are_refused(
    number: str,
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    plugins: None,
) -> None:
    args = adapters(tmp_path, **arguments)
    check_adapters_of(args, model())
    with pytest.raises(DcpConfigError) as caught:
        check_adapters_of(args, model(**{number: 4}))
    assert str(caught.value).startswith(f"{message}does not work with DCP: no server ")


@pytest.mark.parametrize(
    "arguments",
    [
        {"one": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"given": {"q_proj"}, "one": "all-linear"},
        {"enable_lora": False, "one": ["down_proj"]},
        {"given": {"down_proj"}},
    ],
    ids=["attention", "layers-chosen", "off-by-name", "off"],
)
def test_adapters_beside_experts_are_not_refused(
    arguments: dict[str, Any], tmp_path: Path, plugins: None
) -> None:
    check_adapters_of(adapters(tmp_path, **arguments), model(num_experts=4))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
