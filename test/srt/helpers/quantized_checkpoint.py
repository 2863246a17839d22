"""Tiny checkpoints of each format, quantized from tiny models with sizes that kernels take."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.quantized import FORMATS, ONLINE_FP8, Format
from sglang_dcp.demo.tiny_kinds import KINDS, TinyModel
from sglang_dcp.demo.tiny_model import make_model

_WEIGHTS = "model.safetensors"
_MARK = "quantized.json"
# Raise it when the same kind, format and seed start to give other files.
_VERSION = 2
# SGLang derives the K weights of MLA from `kv_b_proj`, and cannot from these formats. It fuses
# the two projections down to latents, and cannot along the packed dimension of GPTQ.
NOT_FOR_LATENTS = ("gptq", "w4a16")
LATENT_PROJECTIONS = ("kv_b_proj", "kv_a_proj", "q_a_proj")
# FP8 with scales of K and V for an fp8 cache.
KV_SCALES = "fp8-tensor-kv"
FORMS: Mapping[str, Format] = {
    **FORMATS,
    KV_SCALES: FORMATS["fp8-tensor"],
    # The server quantizes these itself. SGLang refuses to do so with weights in float32.
    "bf16": ONLINE_FP8,
}


def _sized(kind: str, **sizes: Any) -> TinyModel:
    found = KINDS[kind]
    return replace(found, sizes={**found.sizes, **sizes})


# Cut over 2 ranks, every matrix is a multiple of 128 in what it sums over.
QUANTIZED_KINDS: Mapping[str, TinyModel] = {
    # Not Llama: SGLang itself leaves out its scales of fp8 blocks.
    "qwen3-2kv": _sized("qwen3", head_dim=128),
    "qwen3-moe": _sized("qwen3-moe-d128", moe_intermediate_size=256),
    "mla-v3": _sized("mla-v3-d512", q_lora_rank=256, moe_intermediate_size=256),
}
# SGLang's attention of Qwen3 takes no scales of K and V, and that of Llama does.
SCALED_KIND = "llama-2kv-d128"
_KINDS = {**QUANTIZED_KINDS, SCALED_KIND: KINDS[SCALED_KIND]}


def tiny_model(path: Path, kind: str, seed: int = 0) -> Path:
    """Write the model of `kind` in float32 at `path`, and return the path."""
    return make_model(path, f"quantized-{kind}", _KINDS[kind], seed=seed)


def make_quantized(path: Path, kind: str, name: str, seed: int = 0) -> Path:
    """Write the model of `kind` in format `name` at `path`, and return the path.

    A folder that this function made with the same arguments is kept, another is replaced.
    """
    mark = {"version": _VERSION, "kind": kind, "format": name, "seed": seed}
    if path.exists() and json.loads((path / _MARK).read_text()) == mark:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantized-") as scratch:
        fresh = tiny_model(Path(scratch) / "model", kind, seed)
        _quantize(fresh, FORMS[name], left_in_16_bit(kind, name))
        if name == KV_SCALES:
            _add_kv_scales(fresh, int(_KINDS[kind].sizes["num_hidden_layers"]))
        (fresh / _MARK).write_text(json.dumps(mark))
        if path.exists():
            shutil.rmtree(path)
        os.replace(fresh, path)
    return path


def left_in_16_bit(kind: str, name: str) -> tuple[str, ...]:
    """Return parts of names of modules that stay in 16 bit."""
    latents = "kv_lora_rank" in _KINDS[kind].sizes
    left = LATENT_PROJECTIONS if latents and name in NOT_FOR_LATENTS else ()
    return ("lm_head", *left)


def _quantize(folder: Path, form: Format, left: tuple[str, ...]) -> None:
    weights = load_file(folder / _WEIGHTS)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if "_proj" in module.rsplit(".", 1)[-1] and not any(p in name for p in left):
            for suffix, tensor in form.quantize(weight).items():
                stored[f"{module}.{suffix}"] = tensor.contiguous()
        else:
            keep = weight.dim() == 1 and "bias" in name
            stored[name] = weight if keep else weight.bfloat16()
    save_file(stored, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    if form.config is not None:
        config["quantization_config"] = quantization_config(form, left)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def kv_scales(layer: int) -> dict[str, torch.Tensor]:
    """Return the scales of a layer, by the names of its tensors.

    No two are equal, none is a power of two, and K and V stay within fp8.
    """
    k, v = 0.3 + 0.07 * layer, 0.11 + 0.03 * layer
    prefix = f"model.layers.{layer}.self_attn"
    return {
        f"{prefix}.k_proj.k_scale": torch.tensor(k),
        f"{prefix}.v_proj.v_scale": torch.tensor(v),
    }


def _add_kv_scales(folder: Path, layers: int) -> None:
    weights = load_file(folder / _WEIGHTS)
    for layer in range(layers):
        weights.update(kv_scales(layer))
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def quantization_config(form: Format, left: tuple[str, ...]) -> dict[str, Any]:
    """Return what config.json says, of modules left in 16 bit too."""
    config = dict(form.config or {})
    if form.skip == "ignore":
        names = ["lm_head", *(f"re:.*{part}.*" for part in left[1:])]
        config[form.skip] = names
    elif form.skip:
        config[form.skip] = list(left)
    elif left[1:]:
        config["dynamic"] = {f"-:.*{part}.*": {} for part in left[1:]}
    return config
