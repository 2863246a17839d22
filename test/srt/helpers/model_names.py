"""Checkpoints of architectures that transformers lacks, from models that compute the same.

transformers makes and runs a model of another class. Then its weights get the names and
forms that SGLang's class reads, so that transformers is an oracle all the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Renamed:
    """How a checkpoint changes once transformers has run it.

    `names` are patterns and what they become, in order. `reform` then changes tensors.
    `before` changes them before transformers runs. `config` holds keys of config.json.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    reform: Callable[[Tensors], Tensors] = dict
    before: Callable[[Tensors], Tensors] = dict
    config: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, model: Path) -> None:
        """Change what transformers reads too."""
        _rewrite(model, self.before)

    def apply(self, model: Path) -> None:
        """Make a checkpoint of transformers one of SGLang's class."""
        _rewrite(model, lambda tensors: self.reform(self._named(tensors)))
        file = model / "config.json"
        content = {**json.loads(file.read_text()), **self.config}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def _named(self, tensors: Tensors) -> Tensors:
        named = {}
        for name, tensor in tensors.items():
            for pattern, new in self.names.items():
                name = re.sub(pattern, new, name)
            named[name] = tensor
        return named


def _rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    changed = change(load_file(file))
    found = {name: tensor.contiguous() for name, tensor in changed.items()}
    save_file(found, file, metadata={"format": "pt"})


def _split_experts(tensors: Tensors) -> Tensors:
    """One tensor for each expert and each half, where GraniteMoE has all in one."""
    split = {}
    for name, tensor in tensors.items():
        base, _, kind = name.removesuffix(".weight").rpartition(".")
        for place, part in _parts(kind, tensor):
            split[f"{base}{place}.weight" if place else name] = part
    return split


def _parts(kind: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if kind not in ("input_linear", "output_linear"):
        return [("", tensor)]
    shared = tensor.dim() == 2
    found = []
    for index, expert in enumerate(tensor[None] if shared else tensor):
        place = "" if shared else f".{index}"
        if kind == "output_linear":
            found.append((f"{place}.down_proj", expert))
        else:
            gate, up = expert.chunk(2)
            found += [(f"{place}.gate_proj", gate), (f"{place}.up_proj", up)]
    return found


def _joined_qkv(tensors: Tensors) -> Tensors:
    """Bailing has Q, K and V in one tensor, one after another."""
    joined = {}
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{s}_proj")] for s in "qkv"]
            name, tensor = name.replace("q_proj", "query_key_value"), torch.cat(parts)
        joined[name] = tensor
    return joined


def _grouped_qkv(tensors: Tensors) -> Tensors:
    """InternLM2 has, for each K/V head, its Q heads, then its K head and its V head."""
    grouped = {}
    for name, tensor in tensors.items():
        if ".wk." in name or ".wv." in name:
            continue
        if ".wq." in name:
            q, k, v = (tensors[name.replace("wq", f"w{s}")] for s in "qkv")
            # The kind has 8 query heads and 2 K/V heads.
            heads = [
                rows.unflatten(0, (2, n, -1)) for rows, n in ((q, 4), (k, 1), (v, 1))
            ]
            name, tensor = name.replace("wq", "wqkv"), torch.cat(heads, 1).flatten(0, 2)
        grouped[name] = tensor
    return grouped


def _repeated_layers(tensors: Tensors) -> Tensors:
    """Let layers 2 and 3 be layers 0 and 1 once more."""
    source = {r"layers\.2\.": "layers.0.", r"layers\.3\.": "layers.1."}
    repeated = {}
    for name in tensors:
        copied = name
        for pattern, first in source.items():
            copied = re.sub(pattern, first, copied)
        repeated[name] = tensors[copied].clone()
    return repeated


def _first_layers(tensors: Tensors) -> Tensors:
    late = ("model.layers.2.", "model.layers.3.")
    return {n: tensor for n, tensor in tensors.items() if not n.startswith(late)}


_EXPERTS_OF_GRANITE = {
    r"block_sparse_moe\.router\.layer": "mlp.gate",
    r"block_sparse_moe\.": "mlp.experts.",
    r"shared_mlp\.": "mlp.shared_experts.",
}
_BAILING = {
    r"model\.embed_tokens": "model.word_embeddings",
    r"self_attn\.o_proj": "attention.dense",
    r"self_attn\.q_norm": "attention.query_layernorm",
    r"self_attn\.k_norm": "attention.key_layernorm",
    r"self_attn\.": "attention.",
    r"e_score_correction_bias": "expert_bias",
}

RENAMED: Mapping[str, Renamed] = {
    "bailing-moe": Renamed(
        {**_BAILING, **_EXPERTS_OF_GRANITE},
        lambda tensors: _joined_qkv(_split_experts(tensors)),
    ),
    "bailing-moe-v2": Renamed(_BAILING, _joined_qkv),
    "deepseek": Renamed(_EXPERTS_OF_GRANITE, _split_experts),
    "exaone": Renamed(
        {
            r"model\.embed_tokens": "transformer.wte",
            r"model\.norm": "transformer.ln_f",
            r"model\.layers": "transformer.h",
            r"self_attn\.o_proj": "self_attn.out_proj",
            r"self_attn": "attn.attention",
            r"input_layernorm": "ln_1",
            r"post_attention_layernorm": "ln_2",
            r"gate_proj": "c_fc_0",
            r"up_proj": "c_fc_1",
            r"down_proj": "c_proj",
        }
    ),
    "internlm2": Renamed(
        {
            r"embed_tokens": "tok_embeddings",
            r"lm_head": "output",
            r"self_attn\.o_proj": "attention.wo",
            r"self_attn\.(\w)_proj": r"attention.w\1",
            r"input_layernorm": "attention_norm",
            r"post_attention_layernorm": "ffn_norm",
            r"mlp\.gate_proj": "feed_forward.w1",
            r"mlp\.up_proj": "feed_forward.w3",
            r"mlp\.down_proj": "feed_forward.w2",
        },
        _grouped_qkv,
    ),
    # Two loops over two layers are four layers.
    "nanbeige": Renamed(
        before=_repeated_layers,
        reform=_first_layers,
        config={"model_type": "nanbeige", "num_hidden_layers": 2},
    ),
    "xverse-moe": Renamed(
        {
            **_EXPERTS_OF_GRANITE,
            r"mlp\.gate\.weight": "mlp.router.weight",
        },
        _split_experts,
    ),
}
