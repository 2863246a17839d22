"""The KV cache dtype that a checkpoint asks for, known before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

import torch

from sglang_dcp.layers.backends.capabilities import FP8, Requirement
from sglang_dcp.layers.backends.registry import backend_names, find_mismatch
from sglang_dcp.support.quantization import quantization_config
from sglang_dcp.support.rules import raise_unsupported

_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")
# ModelOpt writes it beside a config.json that says nothing of quantization.
_OF_MODELOPT = "hf_quant_config.json"


def kv_dtype_of_checkpoint(model: Any) -> Optional[torch.dtype]:
    """Return fp8 if SGLang takes it for `--kv-cache-dtype auto`, else None.

    SGLang itself finds it once the weights are read, in `mem_cache/kv_cache_dtype.py`. Its
    own class for the format reads the config, as each format and release has other keys.
    A config that is not in config.json is found only in a local folder. `model` is
    SGLang's `ModelConfig`.
    """
    from sglang.srt.layers.quantization import get_quantization_config

    if model.quantization is None:
        return None
    quantization = get_quantization_config(model.quantization)
    config = _config_of(model, quantization)
    if not _names_kv(config):
        return None
    # The loader adds the mapping, from the class of the model.
    given = {**config, "packed_modules_mapping": {}, "hf_config": model.hf_config}
    found = quantization.from_config(given)
    asked = getattr(found, "kv_cache_quant_algo", None)
    return FP8 if isinstance(asked, str) and asked.upper() == "FP8" else None


def _config_of(model: Any, quantization: Any) -> dict[str, Any]:
    """Return the config that SGLang's `get_quant_config` takes, empty if it takes none.

    That is config.json's, where it is whole, and else a file that the format names.
    """
    config = quantization_config(model)
    mixed = model.quantization == "modelopt_mixed"
    if config and not (
        mixed and ("quantized_layers" not in config or not _names_kv(config))
    ):
        return config
    path = Path(getattr(model, "model_path", ""), _OF_MODELOPT)
    if _OF_MODELOPT not in quantization.get_config_filenames() or not path.is_file():
        return {}
    return dict(json.loads(path.read_text()))


def _names_kv(config: dict[str, Any]) -> bool:
    named = {*config, *(config.get("quantization") or ())}
    return bool(named.intersection(_KEYS))


def check_kv_dtype_of_checkpoint(args: Any, requirement: Requirement) -> None:
    """Raise `DcpConfigError` if `auto` means a KV cache that the backend cannot read.

    Parameters
    ----------
    args
        Resolved server arguments.
    requirement : Requirement
        What the server requires, with the KV dtype of the checkpoint.
    """
    if args.kv_cache_dtype != "auto" or requirement.kv_dtype != FP8:
        return
    problem = find_mismatch(args.attention_backend, requirement)
    if problem is None or problem.flag != "--kv-cache-dtype":
        return
    raise_unsupported(
        problem.flag,
        f"auto, which means {problem.value} for this checkpoint,",
        problem.reason,
        " or ".join((*_other_backends(requirement), _in_bf16(requirement))),
    )


def _other_backends(requirement: Requirement) -> list[str]:
    others = backend_names(requirement)
    return [f"use --attention-backend {' or '.join(others)}"] if others else []


def _in_bf16(requirement: Requirement) -> str:
    dtype = "" if requirement.dtype == torch.bfloat16 else "--dtype bfloat16 "
    return f"use {dtype}--kv-cache-dtype bf16"
