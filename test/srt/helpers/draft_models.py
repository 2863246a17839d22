"""Tiny draft models with random weights, beside the tiny target models.

Few of their drafts are right. What they show is that a draft's layers run over the sharded
pool, and that rejected drafts leave no trace in what the target answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_STD = 0.12
_WEIGHTS = "model.safetensors"


def make_eagle3(folder: Path, target: Path, *, kv_heads: int | None = None) -> Path:
    """Write an EAGLE3 head for a Llama or Qwen target, with as many heads by default."""
    config = json.loads((target / "config.json").read_text())
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads = config["num_attention_heads"]
    own_kv = kv_heads or config["num_key_value_heads"]
    inner, vocab = config["intermediate_size"], config["vocab_size"]
    layer = "midlayer"
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        f"{layer}.self_attn.q_proj.weight": (heads * dim, 2 * hidden),
        f"{layer}.self_attn.k_proj.weight": (own_kv * dim, 2 * hidden),
        f"{layer}.self_attn.v_proj.weight": (own_kv * dim, 2 * hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * dim),
        f"{layer}.mlp.gate_proj.weight": (inner, hidden),
        f"{layer}.mlp.up_proj.weight": (inner, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, inner),
        f"{layer}.hidden_norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    more = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_key_value_heads": own_kv,
        "draft_vocab_size": vocab,
    }
    return _write(folder, target, {**config, **more}, _draw(shapes))


def make_eagle(folder: Path, target: Path) -> Path:
    """Write an EAGLE head for a Llama target: a decoder layer behind one projection."""
    config = json.loads((target / "config.json").read_text())
    weights = load_file(target / _WEIGHTS)
    hidden = config["hidden_size"]
    shapes = {
        name.removeprefix("model."): tuple(weight.shape)
        for name, weight in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    shapes["fc.weight"], shapes["fc.bias"] = (hidden, 2 * hidden), (hidden,)
    more = {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    return _write(folder, target, {**config, **more}, _draw(shapes))


def make_with_mtp(folder: Path, target: Path) -> Path:
    """Write a DeepSeek target again, with a layer that predicts the token after the next."""
    config = json.loads((target / "config.json").read_text())
    weights = load_file(target / _WEIGHTS)
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    found = f"model.layers.{last - 1}."
    layer = f"model.layers.{last}."
    shapes = {
        layer + name.removeprefix(found): tuple(weight.shape)
        for name, weight in weights.items()
        if name.startswith(found)
    }
    shapes[f"{layer}eh_proj.weight"] = (hidden, 2 * hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        shapes[f"{layer}{name}.weight"] = (hidden,)
    drawn = _draw(shapes)
    for name, of in (
        ("embed_tokens", "model.embed_tokens"),
        ("shared_head.head", "lm_head"),
    ):
        drawn[f"{layer}{name}.weight"] = weights[f"{of}.weight"].clone()
    more = {"num_nextn_predict_layers": 1}
    return _write(folder, target, {**config, **more}, {**weights, **drawn})


def _draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    drawn = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name and len(shape) == 1
        drawn[name] = 1 + 0.02 * noise if norm else _STD * noise
    return drawn


def _write(
    folder: Path, target: Path, config: Mapping[str, Any], weights: dict[str, Tensor]
) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    return folder
