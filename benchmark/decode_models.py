"""Models by name.

Dimensions are those of the published config.json files.

Weights are dummies, so what only changes their use is left out: the rotary embedding is
plain (no yarn or llama3 scaling) and as long as the benchmark's longest context.

`Qwen3-30B-A3B/4` is no published model. It stands for a large model on few GPUs, with a
quarter of the heads and of the experts' width. At tp 2 a rank has the attention work, the
expert work and the K/V bytes of a rank of the whole model at tp 8. DCP 2 (attn-tp 1) stands
for DCP 2 there (attn-tp 4). Three things differ:

- An all-reduce goes over 2 ranks instead of 8.
- Embedding and LM head are cut 2 ways instead of 8, so a rank reads four times as much of
  the LM head.
- DCP over all ranks is 2 instead of 8.

`+MTP` is no published model either: DeepSeek-V2-Lite's dimensions under the architecture of
DeepSeek-V3, which alone has a layer that drafts. The target computes what it computes as
DeepSeek-V2-Lite.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
}
_QWEN3_30B_A3B_QUARTER = {
    **_QWEN3_30B_A3B,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 192,
}
_QWEN2_5_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
_QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
_DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "vocab_size": 102400,
    "rope_theta": 10000.0,
}
# SGLang makes a draft of the model type and of the architecture alone.
_WITH_MTP = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_nextn_predict_layers": 1,
}
# No published model: for trying the scripts on a CPU.
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1024,
    "rope_theta": 10000.0,
}
_TINY_MLA = {
    **_DEEPSEEK_V2_LITE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "vocab_size": 1024,
}
_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "Qwen3-30B-A3B/4": _QWEN3_30B_A3B_QUARTER,
    "Qwen2.5-3B": _QWEN2_5_3B,
    "Qwen2.5-7B": _QWEN2_5_7B,
    "Llama-3.1-8B": _LLAMA_3_1_8B,
    "DeepSeek-V2-Lite": _DEEPSEEK_V2_LITE,
    "DeepSeek-V2-Lite+MTP": {**_DEEPSEEK_V2_LITE, **_WITH_MTP},
    "tiny": _TINY,
    "tiny-mla": _TINY_MLA,
    "tiny-mla+MTP": {**_TINY_MLA, **_WITH_MTP},
}

# How a KV pool was filled: random numbers in scattered pages, or by the model.
DIRECT, PREFILLED = "direct", "prefilled"


def default_model(tp: int) -> str:
    """A model of which plain tensor parallelism stores each token twice at `tp` 2, 4, 8."""
    by_tp = {2: "Qwen3-30B-A3B/4", 4: "Qwen2.5-3B", 8: "Qwen3-30B-A3B"}
    return by_tp.get(tp, "Qwen2.5-3B")


def is_mla(model: str) -> bool:
    """Whether the KV cache holds latents."""
    return "kv_lora_rank" in MODELS[model]


def kv_heads(model: str) -> int:
    """K/V heads of the cache; MLA's latent is one, whatever config.json says."""
    return 1 if is_mla(model) else int(MODELS[model]["num_key_value_heads"])


def kv_copies(model: str, tp: int) -> int:
    """How often plain tensor parallelism stores a token of the KV cache."""
    return max(1, tp // kv_heads(model))


def query_heads(model: str) -> int:
    return int(MODELS[model]["num_attention_heads"])


def vocab_size(model: str) -> int:
    """Number of token ids of a model of `MODELS`."""
    return int(MODELS[model]["vocab_size"])


def write_model(
    folder: Path,
    model: str,
    context_length: int,
    more: Optional[Mapping[str, Any]] = None,
) -> Path:
    """Write config.json for `--load-format dummy` into `folder` and return `folder`.

    `more` is what it says beside the model's dimensions.
    """
    return write_config(folder, {**MODELS[model], **(more or {})}, context_length)


def write_config(folder: Path, sizes: Mapping[str, Any], context_length: int) -> Path:
    """Write the config.json of a model that has these `sizes`; return `folder`."""
    config = {**_COMMON, **sizes, "max_position_embeddings": context_length}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
