"""LoRA adapters with random weights, and checkpoints with an adapter merged by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Adapter:
    """One adapter: rank, alpha, and the linear layers that it changes.

    A layer that the checkpoint lacks somewhere, as in layers of experts, is left out there.
    Its file has weights of `dtype`.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    seed: int
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


GQA = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# For servers on GPUs, by the words of their flags (`helpers.gpu_checkpoints`).
BF16_ADAPTERS = {
    "lora_all": Adapter(8, 16, GQA + MLP, 1, torch.bfloat16),
    "lora_some": Adapter(4, 6, ("q_proj", "v_proj"), 2, torch.bfloat16),
    "lora_late": Adapter(6, 6, GQA, 3, torch.bfloat16),
}


def write_adapter(folder: Path, model: Path, adapter: Adapter) -> Path:
    """Write `adapter` for the checkpoint `model` as peft would, and return `folder`."""
    folder.mkdir(parents=True)
    weights: dict[str, torch.Tensor] = {}
    for name, (down, up) in _factors(model, adapter).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{stem}.lora_A.weight"] = down.to(adapter.dtype)
        weights[f"{stem}.lora_B.weight"] = up.to(adapter.dtype)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.targets),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_merged(folder: Path, model: Path, adapter: Adapter) -> Path:
    """Write `model` with W + scale * B @ A in the place of each W; return `folder`."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    for name, (down, up) in _factors(model, adapter).items():
        weights[name] = weights[name] + adapter.scale * (up @ down)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _factors(
    model: Path, adapter: Adapter
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [rank, inputs] and B [outputs, rank] by the name of the weight that they change."""
    draw = torch.Generator().manual_seed(adapter.seed)
    found = {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        parts = name.split(".")
        if "experts" in parts or parts[-1] != "weight":
            continue
        if parts[-2] in adapter.targets:
            outputs, inputs = weight.shape
            down = torch.randn(adapter.rank, inputs, generator=draw)
            up = torch.randn(outputs, adapter.rank, generator=draw)
            found[name] = (0.12 * down, 0.12 * up)
    assert found, f"{model} has none of {adapter.targets}"
    return found
