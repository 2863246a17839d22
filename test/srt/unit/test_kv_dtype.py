"""A checkpoint that asks for an fp8 KV cache by itself is known before its weights.

Only this file holds the answer at start against what SGLang takes from the loaded model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype

from helpers.quantized import FORMATS
from sglang_dcp.config import DcpConfigError
from sglang_dcp.layers.backends.capabilities import FP8, Requirement
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support.backends import requirement_of
from sglang_dcp.support.kv_dtype import (
    check_kv_dtype_of_checkpoint,
    kv_dtype_of_checkpoint,
)

SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}
LATER = in_range(sglang_version(), "0.5.23", None)


def model(quantization: str | None, config: dict[str, Any], path: str = "") -> Any:
    return SimpleNamespace(
        quantization=quantization,
        hf_config=SimpleNamespace(quantization_config=config),
        model_path=path,
        dtype=torch.bfloat16,
        head_dim=128,
        hf_text_config=SimpleNamespace(num_attention_heads=8),
    )


def with_cache(name: str, **more: Any) -> dict[str, Any]:
    return {**(FORMATS[name].config or {}), **more}


# Format, what the checkpoint says, and whether it means fp8 on either release.
ASKED = {
    "modelopt": ("modelopt_fp8", with_cache("fp8-modelopt"), False, False),
    "modelopt-scheme": (
        "modelopt_fp8",
        with_cache("fp8-modelopt", kv_cache_scheme=SCHEME),
        True,
        True,
    ),
    "modelopt-algo": (
        "modelopt_fp8",
        with_cache("fp8-modelopt", kv_cache_quant_algo="FP8"),
        True,
        True,
    ),
    "compressed": (
        "compressed-tensors",
        with_cache("fp8-channel", kv_cache_scheme=SCHEME),
        False,
        True,
    ),
    "compressed-none": (
        "compressed-tensors",
        with_cache("fp8-channel", kv_cache_scheme=None),
        False,
        False,
    ),
    "compressed-int": (
        "compressed-tensors",
        with_cache("fp8-channel", kv_cache_scheme={**SCHEME, "type": "int"}),
        False,
        False,
    ),
    "fp8": ("fp8", with_cache("fp8-block", kv_cache_quant_algo="fp8"), False, True),
    "not-quantized": (None, {}, False, False),
}


@pytest.mark.parametrize("case", ASKED.values(), ids=ASKED)
def test_what_a_checkpoint_asks_for(
    case: tuple[str, dict[str, Any], bool, bool],
) -> None:
    name, config, before, later = case
    wanted = FP8 if (later if LATER else before) else None
    assert kv_dtype_of_checkpoint(model(name, config)) == wanted
    assert "packed_modules_mapping" not in config


@pytest.mark.parametrize("algo", ["FP8", None])
def test_a_config_of_modelopt_beside_config_json(
    algo: str | None, tmp_path: Path
) -> None:
    section = {"quant_algo": "FP8", "kv_cache_quant_algo": algo}
    told = json.dumps({"quantization": section | {"exclude_modules": []}})
    (tmp_path / "hf_quant_config.json").write_text(told)
    found = kv_dtype_of_checkpoint(model("modelopt_fp8", {}, str(tmp_path)))
    assert found == (FP8 if algo else None)


@pytest.mark.parametrize("name", ["w4afp8", "mxfp8", "fp8"])
@pytest.mark.parametrize("algo", ["FP8", None])
def test_formats_that_read_no_file_of_modelopt(
    name: str, algo: str | None, tmp_path: Path
) -> None:
    """SGLang takes their defaults, which ask for nothing."""
    section = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": algo}
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": section})
    )
    assert kv_dtype_of_checkpoint(model(name, {}, str(tmp_path))) is None


@pytest.mark.skipif(not LATER, reason="needs SGLang 0.5.23, which has the format")
def test_a_mixed_config_that_is_not_whole_is_read_from_its_file(tmp_path: Path) -> None:
    told = {"quant_method": "modelopt", "kv_cache_scheme": SCHEME}
    assert kv_dtype_of_checkpoint(model("modelopt_mixed", told, str(tmp_path))) is None


@pytest.mark.parametrize("case", ASKED.values(), ids=ASKED)
def test_sglang_takes_the_same_once_the_model_is_built(
    case: tuple[str, dict[str, Any], bool, bool],
) -> None:
    from sglang.srt.layers.quantization import get_quantization_config

    name, config, *_ = case
    built = SimpleNamespace(quant_config=None)
    if name:
        given = {**config, "packed_modules_mapping": {}}
        built.quant_config = get_quantization_config(name).from_config(given)
    _, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype="auto",
        model=built,
        model_dtype=torch.bfloat16,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    found = kv_dtype_of_checkpoint(model(name, config))
    assert dtype == (found or torch.bfloat16)


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("auto", FP8),
        ("fp8_e4m3", FP8),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_a_flag_wins_over_the_checkpoint(flag: str, wanted: torch.dtype) -> None:
    config = with_cache("fp8-modelopt", kv_cache_quant_algo="FP8")
    args = SimpleNamespace(
        device="cuda", kv_cache_dtype=flag, dcp=SimpleNamespace(tp_size=2)
    )
    need = requirement_of(args, model("modelopt_fp8", config), mla=False)
    assert need.kv_dtype == wanted


def need(**more: Any) -> Requirement:
    given = {"dtype": torch.bfloat16, "kv_dtype": FP8, "head_dim": 128, **more}
    return Requirement("cuda", **given)


LATENTS = {"mla": True, "head_dim": (512, 64)}
REFUSED = {
    "latents-on-fa3": (
        "fa3",
        need(**LATENTS),
        "copy the whole pool.*; use --attention-backend flashinfer or use "
        "--kv-cache-dtype bf16$",
    ),
    "torch_native": (
        "torch_native",
        need(),
        "; use --attention-backend fa3 or flashinfer or triton or use",
    ),
    "a-cpu": (
        "torch_native",
        need()._replace(device="cpu"),
        "; use --kv-cache-dtype bf16$",
    ),
    "float32-on-a-cpu": (
        "torch_native",
        need(dtype=torch.float32)._replace(device="cpu"),
        "; use --dtype bfloat16 --kv-cache-dtype bf16$",
    ),
}


@pytest.mark.parametrize("name, wants, message", REFUSED.values(), ids=REFUSED)
def test_refused_where_the_backend_cannot_read_it(
    name: str, wants: Requirement, message: str
) -> None:
    args = SimpleNamespace(kv_cache_dtype="auto", attention_backend=name)
    told = "^--kv-cache-dtype auto, which means float8_e4m3fn for this checkpoint, does"
    with pytest.raises(DcpConfigError, match=f"{told} not work .*{message}"):
        check_kv_dtype_of_checkpoint(args, wants)
    # The flags that the message names.
    in_bf16 = wants._replace(kv_dtype=torch.bfloat16, dtype=torch.bfloat16)
    check_kv_dtype_of_checkpoint(args, in_bf16)


@pytest.mark.parametrize(
    ("name", "wants"),
    [
        ("fa3", need()),
        ("flashinfer", need(**LATENTS)),
        ("triton", need()),
        ("torch_native", need(kv_dtype=None)),
    ],
)
def test_served_where_the_backend_reads_it(name: str, wants: Requirement) -> None:
    args = SimpleNamespace(kv_cache_dtype="auto", attention_backend=name)
    check_kv_dtype_of_checkpoint(args, wants)


def test_through_the_real_constructor(
    server_args: Any, tiny_llama: str, tmp_path: Path
) -> None:
    """A server on a CPU, whose only backend reads no fp8, ends before its weights."""
    config = json.loads((Path(tiny_llama) / "config.json").read_text())
    config["quantization_config"] = with_cache(
        "fp8-modelopt", kv_cache_quant_algo="FP8"
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = {"model_path": str(tmp_path), "dtype": "bfloat16"}
    with pytest.raises(DcpConfigError, match="--kv-cache-dtype auto, which means"):
        server_args(tp_size=2, dcp_size=2, **path)
    assert server_args(tp_size=2, dcp_size=2, kv_cache_dtype="bf16", **path).dcp


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
