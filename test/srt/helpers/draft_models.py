"""Tiny draft models beside the tiny target models: with random weights, or mostly right.

Few drafts of random weights are right. They show that a draft's layers run over the sharded
pool, and that rejected drafts leave no trace in what the target answers.

A head is mostly right if it computes what its target computes. So there are targets of which
only the last layer does anything, and heads with that layer's weights. They draft as a
STANDALONE draft does that is the target itself, if their attention is right.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_STD = 0.12
_WEIGHTS = "model.safetensors"
# Size of each place of an embedding whose norm is known. Exact in 16 bit.
_PLACE = 0.125
# What a step of a right EAGLE3 head leaves of its output for the next one. Exact in 16 bit.
_FADED = 2.0**-20


def make_eagle3(
    folder: Path, target: Path, *, kv_heads: int | None = None, right: bool = False
) -> Path:
    """Write an EAGLE3 head for a Llama or Qwen target, with as many heads by default.

    A `right` one needs a target of `make_shallow_llama`, and its K/V heads.
    """
    config, weights = _read(target)
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
        # The next step then gets a norm's output, not its input.
        "norm_output": right,
    }
    drawn = _draw(shapes)
    if right:
        drawn.update(_right_eagle3(config, weights, drawn))
    return _write(folder, target, {**config, **more}, drawn)


def make_shallow_llama(folder: Path, target: Path) -> Path:
    """Write a Llama target again, for which `make_eagle3` can make a right head.

    Embeddings have the first half of the hidden places. The last layer's attention alone
    writes, to the second half, and the output layer reads that half alone.
    """
    config, weights = _read(target)
    _silence_all_but_last(config, weights)
    half, last = config["hidden_size"] // 2, _last_layer(config)
    weights["model.embed_tokens.weight"][:, half:] = 0
    weights[f"{last}self_attn.o_proj.weight"][:half] = 0
    weights[f"{last}mlp.down_proj.weight"].zero_()
    weights["lm_head.weight"][:, :half] = 0
    return _write(folder, target, config, weights)


def _right_eagle3(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], drawn: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What of a head differs from `drawn`: it attends as the target's last layer.

    Its residual begins with the target's hidden states, which stay in the first half. In
    later steps it begins with the step before, so that the second half has to fade.
    """
    half, last = config["hidden_size"] // 2, _last_layer(config)
    found = {
        f"midlayer.{name.removeprefix(last)}": weight.clone()
        for name, weight in weights.items()
        if name.startswith(last)
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        # Behind the embedding it would read hidden states.
        own = found[f"midlayer.self_attn.{name}.weight"]
        found[f"midlayer.self_attn.{name}.weight"] = torch.cat(
            [own, torch.zeros_like(own)], 1
        )
    found["fc.weight"] = drawn["fc.weight"].clone()
    found["fc.weight"][half:] = 0
    found["norm.weight"] = weights["model.norm.weight"].clone()
    found["norm.weight"][half:] *= _FADED
    found["lm_head.weight"] = weights["lm_head.weight"] / _FADED
    return found


def make_eagle(folder: Path, target: Path) -> Path:
    """Write an EAGLE head for a Llama target: a decoder layer behind one projection."""
    config, weights = _read(target)
    hidden = config["hidden_size"]
    shapes = {
        name.removeprefix("model."): tuple(weight.shape)
        for name, weight in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    shapes["fc.weight"], shapes["fc.bias"] = (hidden, 2 * hidden), (hidden,)
    more = {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    return _write(folder, target, {**config, **more}, _draw(shapes))


def make_with_mtp(folder: Path, target: Path, *, right: bool = False) -> Path:
    """Write a DeepSeek target again, with a layer that predicts the token after the next.

    A `right` one needs a target of `make_shallow_deepseek`.
    """
    config, weights = _read(target)
    hidden = config["hidden_size"]
    found, layer = _last_layer(config), f"model.layers.{config['num_hidden_layers']}."
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
    if right:
        drawn.update(_right_mtp(config, weights, layer))
    more = {"num_nextn_predict_layers": 1}
    return _write(folder, target, {**config, **more}, {**weights, **drawn})


def make_shallow_deepseek(folder: Path, target: Path) -> Path:
    """Write a DeepSeek target again, for which `make_with_mtp` can make a right layer.

    The last layer alone does anything, and all embeddings have one norm.
    """
    config, weights = _read(target)
    _silence_all_but_last(config, weights)
    embedding = weights["model.embed_tokens.weight"]
    embedding.copy_(torch.where(embedding < 0, -_PLACE, _PLACE))
    return _write(folder, target, config, weights)


def _right_mtp(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], layer: str
) -> dict[str, Tensor]:
    """What of the layer `layer` differs: it gets embeddings alone, as the last layer does."""
    hidden, last = config["hidden_size"], _last_layer(config)
    found = {
        layer + name.removeprefix(last): weight.clone()
        for name, weight in weights.items()
        if name.startswith(last)
    }
    # The norm's output is then its input.
    norm = math.sqrt(_PLACE**2 + config["rms_norm_eps"])
    found[f"{layer}enorm.weight"] = torch.full((hidden,), norm)
    found[f"{layer}eh_proj.weight"] = torch.eye(hidden, 2 * hidden)
    found[f"{layer}shared_head.norm.weight"] = weights["model.norm.weight"].clone()
    return found


def _make_shallow_mtp(folder: Path, target: Path) -> Path:
    without = folder.with_name(f"{folder.name}-without")
    return make_with_mtp(folder, make_shallow_deepseek(without, target), right=True)


def _make_shallow(folder: Path, target: Path) -> Path:
    latents = "kv_lora_rank" in _read(target)[0]
    return (make_shallow_deepseek if latents else make_shallow_llama)(folder, target)


# Targets made of a tiny model, by a word. A draft for a shallow one can be right.
TARGETS: Mapping[str, Callable[[Path, Path], Path]] = {
    "shallow": _make_shallow,
    "mtp": make_with_mtp,
    "shallow-mtp": _make_shallow_mtp,
}


def _last_layer(config: Mapping[str, Any]) -> str:
    return f"model.layers.{config['num_hidden_layers'] - 1}."


def _silence_all_but_last(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Let the other layers add nothing to the hidden states."""
    for name, weight in weights.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        if writes and not name.startswith(_last_layer(config)):
            weight.zero_()


def _draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    drawn = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name and len(shape) == 1
        drawn[name] = 1 + 0.02 * noise if norm else _STD * noise
    return drawn


def _read(target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((target / "config.json").read_text())
    return config, load_file(target / _WEIGHTS)


def _write(
    folder: Path, target: Path, config: Mapping[str, Any], weights: dict[str, Tensor]
) -> Path:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    return folder
