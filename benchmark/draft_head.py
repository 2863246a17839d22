"""An EAGLE3 head for a Llama target in torch: what SGLang's `llama_eagle3.py` computes.

The head is one decoder layer. Row i stands for position i of a text and drafts what follows
token i + 1, which the target has just said:

    step   word it reads   beside the word                  at position   it drafts token
    1      token i + 1     the target's hidden states of i  i             i + 2
    2      token i + 2     step 1's output, before the norm i + 1         i + 3
    k      token i + k     step k - 1's output              i + k - 1     i + k + 1

Step k of row i attends to the first steps of rows 0 to i, and to steps 2 to k of its own row.
Once drafts are verified, SGLang runs the first step over what was accepted, so no other row
keeps keys of later steps. Words are those of the text here. A server puts its drafts in
their place, which is the same for as long as they are right.

The output layer has a smaller vocabulary. `d2t` of the checkpoint tells which words it holds.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

# The target's layers whose inputs a head reads, as many as this.
FEATURES = 3
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

Config = Mapping[str, Any]
KeysValues = tuple[Tensor, Tensor]


def feature_layers(layers: int) -> tuple[int, int, int]:
    """Layers of the target whose inputs the head gets, unless its checkpoint names others."""
    return 2, layers // 2, layers - 3


def _linear(read: int, written: int) -> nn.Linear:
    return nn.Linear(read, written, bias=False)


class _Attention(nn.Module):
    """Grouped attention of the rows and steps above, over [texts, rows, 2 * hidden]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, self.dim = config["hidden_size"], config["head_dim"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.theta = config["rope_parameters"]["rope_theta"]
        self.q_proj = _linear(2 * hidden, self.heads * self.dim)
        self.k_proj = _linear(2 * hidden, self.kv_heads * self.dim)
        self.v_proj = _linear(2 * hidden, self.kv_heads * self.dim)
        self.o_proj = _linear(self.heads * self.dim, hidden)

    def forward(self, states: Tensor, earlier: list[KeysValues]) -> Tensor:
        """Attend as the step after `earlier`, and add its keys and values there."""
        texts, rows, _ = states.shape
        positions = torch.arange(rows, device=states.device) + len(earlier)
        q = self._heads_of(self.q_proj(states), self.heads)
        k = self._heads_of(self.k_proj(states), self.kv_heads)
        v = self._heads_of(self.v_proj(states), self.kv_heads)
        q, k = (rotate(x, positions, self.theta) for x in (q, k))
        group = self.heads // self.kv_heads
        earlier.append((k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        out = attend(q / math.sqrt(self.dim), earlier)
        return self.o_proj(out.transpose(1, 2).reshape(texts, rows, -1))

    def _heads_of(self, flat: Tensor, heads: int) -> Tensor:
        return flat.view(*flat.shape[:2], heads, self.dim).transpose(1, 2)


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of [texts, heads, rows, dim]; halves of a head rotate together."""
    half = states.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, device=states.device) / half)
    angles = positions[:, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Tensor, steps: list[KeysValues]) -> Tensor:
    """Attention over the first steps of all rows so far, and later ones of the own row.

    Queries, keys and values are [texts, heads, rows, dim]; queries are scaled.
    """
    (keys, values), later = steps[0], steps[1:]
    rows = q.shape[2]
    seen = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    scores = (q @ keys.transpose(-1, -2)).masked_fill(~seen, -math.inf)
    own = [(q * k).sum(-1, keepdim=True) for k, _ in later]
    weights = torch.cat([scores, *own], -1).softmax(-1)
    out = weights[..., :rows] @ values
    for index, (_, v) in enumerate(later):
        out = out + weights[..., rows + index, None] * v
    return out


class _Mlp(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = _linear(hidden, inner)
        self.up_proj = _linear(hidden, inner)
        self.down_proj = _linear(inner, hidden)

    def forward(self, states: Tensor) -> Tensor:
        gate = functional.silu(self.gate_proj(states))
        return self.down_proj(gate * self.up_proj(states))


class _Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        norm = (config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.input_layernorm = nn.RMSNorm(*norm)
        self.hidden_norm = nn.RMSNorm(*norm)
        self.post_attention_layernorm = nn.RMSNorm(*norm)

    def forward(
        self, words: Tensor, hidden: Tensor, earlier: list[KeysValues]
    ) -> Tensor:
        both = torch.cat([self.input_layernorm(words), self.hidden_norm(hidden)], -1)
        hidden = hidden + self.self_attn(both, earlier)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftHead(nn.Module):
    """Parameters have the names of the checkpoint. `config` is the target's."""

    def __init__(self, config: Config, vocab: int) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.fc = _linear(FEATURES * hidden, hidden)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = _linear(hidden, vocab)

    def forward(self, features: Tensor, words: Tensor, steps: int) -> list[Tensor]:
        """Return the logits of each step, [texts, rows, vocab] each.

        `features` [texts, rows, 3 * hidden] are the target's. `words`
        [texts, rows + steps - 1, hidden] are embeddings, of token 1 first.
        """
        rows = features.shape[1]
        hidden, logits = self.fc(features), []
        earlier: list[KeysValues] = []
        for step in range(steps):
            hidden = self.midlayer(words[:, step : step + rows], hidden, earlier)
            logits.append(self.lm_head(self.norm(hidden)))
        return logits


def save_head(folder: Path, target: Path, head: DraftHead, vocab: Tensor) -> Path:
    """Write a checkpoint for `--speculative-draft-model-path` in float32.

    `vocab` [words of the head] has the target's id of each word.
    """
    config = json.loads((target / "config.json").read_text())
    config.update(
        architectures=["LlamaForCausalLMEagle3"],
        num_hidden_layers=1,
        draft_vocab_size=len(vocab),
        tie_word_embeddings=False,
        dtype="float32",
    )
    weights = {name: weight.contiguous() for name, weight in head.state_dict().items()}
    weights["d2t"] = vocab - torch.arange(len(vocab))
    folder.mkdir(parents=True)
    for name in _TOKENIZER:
        shutil.copy(target / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
