"""Who drafts for the models of `decode_models.py`, with dummy weights.

    mtp     the layer that predicts the token after the next, of a model `+MTP`
    eagle3  a head of one layer, with the target's heads and the whole vocabulary
    ngram   SGLang's corpus of what it saw, without a model

A published EAGLE3 head often has a smaller vocabulary, which the weights name. Dummies name
none, so this head reads more of its output layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from decode_layouts import Layout
from decode_models import MODELS, is_mla, write_config

ALGORITHMS = {"mtp": "EAGLE", "eagle3": "EAGLE3", "ngram": "NGRAM"}


class Speculation(NamedTuple):
    """Steps of a draft, and tokens that each verification then gives.

    `accepted` counts the token that the target adds: from 1 to `steps` + 1. Without steps
    there is no speculation, and each decode step gives one token.
    """

    steps: int = 0
    accepted: int = 1

    @classmethod
    def parse(cls, text: str) -> Speculation:
        """Read STEPS:ACCEPTED; ValueError for what cannot be."""
        steps, accepted = map(int, text.split(":"))
        if not 1 <= accepted <= steps + 1 or steps < 1:
            raise ValueError(text)
        return cls(steps, accepted)

    @property
    def name(self) -> str:
        return f"k{self.steps}-a{self.accepted}" if self.steps else "off"


class Served(NamedTuple):
    """One server: how attention is laid out, and how it speculates."""

    layout: Layout
    speculation: Speculation

    @property
    def name(self) -> str:
        return f"{self.layout.name} {self.speculation.name}"


def default_draft(model: str) -> str:
    if MODELS[model].get("num_nextn_predict_layers"):
        return "mtp"
    return "ngram" if is_mla(model) else "eagle3"


def impossible_draft(draft: str, model: str) -> Optional[str]:
    """Why SGLang makes no such draft of this model, or None."""
    if draft == "mtp" and not MODELS[model].get("num_nextn_predict_layers"):
        return f"{model} has no MTP layer: name a model +MTP"
    if draft == "eagle3" and is_mla(model):
        return f"--draft eagle3: the head has K/V heads, and {model} has latents"
    return None


def eagle3_head(model: str) -> Mapping[str, Any]:
    """Sizes of a head with the attention heads of `model`."""
    sizes = MODELS[model]
    dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    same = (
        *("hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "vocab_size", "rope_theta"),
    )
    return {
        **{name: sizes[name] for name in same},
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "head_dim": sizes.get("head_dim", dim),
        "draft_vocab_size": sizes["vocab_size"],
    }


def write_draft(draft: str, model: str, target: Path, context_length: int) -> Path:
    """Return the folder that `--speculative-draft-model-path` names.

    A head gets one beside the target's. An MTP layer is a part of the target, and NGRAM
    reads no model.
    """
    if draft != "eagle3":
        return target
    folder = target.with_name(f"{target.name}-eagle3")
    folder.mkdir()
    return write_config(folder, eagle3_head(model), context_length)


def flags_of(speculation: Speculation, draft: str, folder: Path) -> list[str]:
    """Server flags: drafts are chains, since DCP takes no trees."""
    if not speculation.steps:
        return []
    flags = ["--speculative-algorithm", ALGORITHMS[draft]]
    flags += ["--speculative-num-steps", str(speculation.steps)]
    flags += ["--speculative-num-draft-tokens", str(speculation.steps + 1)]
    if draft == "ngram":
        return flags + ["--speculative-ngram-max-bfs-breadth", "1"]
    flags += ["--speculative-eagle-topk", "1"]
    return flags + ["--speculative-draft-model-path", str(folder)]


def environment_of(speculation: Speculation, draft: str) -> dict[str, str]:
    """What makes SGLang accept exactly so many tokens, whatever the drafts are.

    `real-draft-token` keeps the tokens of draft and target. SGLang takes `fixed` alone with
    NGRAM: all tokens are one, and all rows go to the same experts.
    """
    if not speculation.steps:
        return {}
    return {
        "SGLANG_SIMULATE_ACC_LEN": str(speculation.accepted),
        "SGLANG_SIMULATE_ACC_METHOD": "match-expected",
        "SGLANG_SIMULATE_ACC_TOKEN_MODE": (
            "fixed" if draft == "ngram" else "real-draft-token"
        ),
    }
