"""The tiny checkpoints of GPU servers, by words, each written once in a folder.

A kind is one of `sglang_dcp.demo.tiny_kinds`. Behind a `+` comes a number format of
`helpers.quantized_checkpoint`, or a target of `helpers.draft_models`.
"""

from __future__ import annotations

import re
from pathlib import Path

from helpers.draft_models import TARGETS, make_eagle, make_eagle3
from helpers.lora_adapters import BF16_ADAPTERS, write_adapter
from helpers.quantized_checkpoint import make_quantized
from sglang_dcp.demo.tiny_model import make_tiny_model


def checkpoint(folder: Path, kind: str, seed: int) -> Path:
    """The model of a kind, `llama-2kv-d128`, `qwen3-2kv+awq` or `llama-2kv+shallow`."""
    path = folder / "models" / f"{kind}-{seed}"
    name, _, form = kind.partition("+")
    if form in TARGETS:
        target = checkpoint(folder, name, seed)
        return path if path.exists() else TARGETS[form](path, target)
    if form:
        return make_quantized(path, name, form, seed)
    return make_tiny_model(path, name, seed=seed)


def beside(folder: Path, kind: str, seed: int, word: str) -> Path:
    """Another checkpoint for a server of a kind and a seed.

    `seed1` is the same kind with seed 1. `eagle` and `eagle3` are heads for the server's own
    model. That of `eagle3` is right if the kind allows that. `lora_all` and others of
    `BF16_ADAPTERS` are adapters of it.
    """
    if found := re.fullmatch(r"seed(\d+)", word):
        return checkpoint(folder, kind, int(found[1]))
    if word not in ("eagle", "eagle3", *BF16_ADAPTERS):
        raise ValueError(f"no checkpoint {word!r}")
    path = folder / "models" / f"{kind}-{seed}-{word}"
    if path.exists():
        return path
    target = checkpoint(folder, kind, seed)
    if word in BF16_ADAPTERS:
        return write_adapter(path, target, BF16_ADAPTERS[word])
    if word == "eagle":
        return make_eagle(path, target)
    return make_eagle3(path, target, right=kind.endswith("+shallow"))
