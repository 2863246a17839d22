"""Tiny models of the architectures that DCP serves without a mechanism of their own.

Each has 8 query heads over 2 K/V heads, unless its architecture fixes another number.
"""

from __future__ import annotations

from typing import Any, Mapping

from sglang_dcp.demo.tiny_kinds import KINDS, TinyModel


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **more,
    }


def _named(
    family: str, extra: Mapping[str, Any] | None = None, **more: Any
) -> TinyModel:
    sizes, architecture = _sizes(**more), f"{family}ForCausalLM"
    return TinyModel(f"{family}Config", architecture, sizes, dict(extra or {}))


def _class(name: str) -> dict[str, Any]:
    """For a checkpoint of a class that SGLang calls otherwise than transformers does."""
    return {"architectures": [name]}


_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LIKE_GLM: dict[str, Any] = {
    "head_dim": 16,
    "use_qk_norm": True,
    "attention_bias": True,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **_EXPERTS,
}
_GRANITE_EXPERTS: dict[str, Any] = {
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def _like_granite(name: str, extra: Mapping[str, Any], **more: Any) -> TinyModel:
    """A class that scales what Granite scales, by keys of its own."""
    # Granite scales queries by a key. Others do so by their head dim, which is 16 here.
    return _named(
        "Granite", {**_class(name), **extra}, attention_multiplier=0.25, **more
    )


def _softmax_experts(name: str, **extra: Any) -> TinyModel:
    """A class with shared experts, and with softmax scores that are scaled to sum 1."""
    return _named(
        "GraniteMoeShared",
        {**_class(name), "norm_topk_prob": True, "head_dim": 16, **extra},
        attention_multiplier=0.25,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=128,
    )


_BAILING: dict[str, Any] = {
    "num_experts": 4,
    "num_shared_experts": 1,
    "use_bias": False,
    "embedding_dropout": 0.0,
}

MODEL_KINDS: Mapping[str, TinyModel] = {
    "apertus": _named("Apertus", head_dim=16, hidden_act="xielu"),
    "arcee": _named("Arcee", head_dim=16),
    "cohere": _named(
        "Cohere", use_qk_norm=True, logit_scale=1.0, tie_word_embeddings=True
    ),
    "deepseek-v3": KINDS["mla-v3"],
    "ernie4.5": _named("Ernie4_5", _class("Ernie4_5_ForCausalLM"), head_dim=16),
    "ernie4.5-moe": _named(
        "Ernie4_5_Moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        # SGLang cannot route its experts on a CPU, so all layers are dense.
        moe_layer_start_index=2,
        moe_layer_end_index=2,
    ),
    "gemma": _named("Gemma", head_dim=16, tie_word_embeddings=True),
    "glm4": _named("Glm4", head_dim=16),
    "glm4-moe": _named(
        "Glm4Moe",
        **_LIKE_GLM,
    ),
    "granite": _named(
        "Granite",
        attention_multiplier=0.3,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        embedding_multiplier=3.0,
    ),
    "granite-moe": _named(
        "GraniteMoe",
        **_GRANITE_EXPERTS,
    ),
    "minimax-m2": _named(
        "MiniMaxM2",
        {"use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid"},
        head_dim=16,
        rotary_dim=8,
        # The transformers of SGLang 0.5.16 do not read `rotary_dim`.
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "partial_rotary_factor": 0.5,
        },
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "ministral3": _named("Ministral3", head_dim=16, sliding_window=None),
    "mistral": _named("Mistral", head_dim=16, sliding_window=None),
    "mixtral": _named(
        "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "olmo2": _named("Olmo2"),
    "phi3": _named("Phi3", sliding_window=None),
    "phimoe": _named(
        "Phimoe",
        _class("PhiMoEForCausalLM"),
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen2-moe": _named(
        "Qwen2Moe",
        num_experts=4,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
        **_EXPERTS,
    ),
    "internlm3": _named("Llama", _class("InternLM3ForCausalLM"), head_dim=16),
    "iquest-coder": _named("Llama", _class("IQuestCoderForCausalLM"), head_dim=16),
    "mimo": _named("Qwen2", _class("MiMoForCausalLM")),
    "xverse": _named("Llama", _class("XverseForCausalLM"), head_dim=16),
    "stablelm": _named("StableLm", partial_rotary_factor=0.5),
    "bailing-moe": _softmax_experts(
        "BailingMoeForCausalLM",
        **_BAILING,
        use_qkv_bias=False,
        first_k_dense_replace=0,
        moe_intermediate_size=128,
    ),
    "bailing-moe-v2": _named(
        "Glm4Moe",
        {
            **_class("BailingMoeV2ForCausalLM"),
            **_BAILING,
            "use_qkv_bias": True,
            "partial_rotary_factor": 0.5,
            "moe_router_enable_expert_bias": True,
            "score_function": "sigmoid",
        },
        **_LIKE_GLM,
    ),
    "deepseek": _softmax_experts(
        "DeepseekForCausalLM",
        n_routed_experts=4,
        n_shared_experts=1,
        moe_intermediate_size=128,
        first_k_dense_replace=0,
        moe_layer_freq=1,
    ),
    "exaone": _named(
        "Llama",
        {
            **_class("ExaoneForCausalLM"),
            "activation_function": "silu",
            "layer_norm_epsilon": 1e-6,
        },
        head_dim=16,
    ),
    "granite-moe-shared": _named(
        "GraniteMoeShared",
        **_GRANITE_EXPERTS,
        shared_intermediate_size=64,
    ),
    "hy-v3": _named(
        "HYV3",
        {"qk_norm": True, "route_norm": True, "first_k_dense_replace": 1},
        head_dim=16,
        num_experts=4,
        mlp_layer_types=["dense", "sparse"],
        **_EXPERTS,
    ),
    "internlm2": _named("Llama", _class("InternLM2ForCausalLM")),
    "minicpm": _like_granite(
        "MiniCPMForCausalLM",
        {"scale_emb": 3.0, "scale_depth": 0.5 * 2**0.5, "dim_model_base": 64},
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "nanbeige": _named(
        "Llama",
        {
            **_class("NanbeigeForCausalLM"),
            "num_loops": 2,
            "skip_loop_final_norm": True,
            "rope_theta": 10000.0,
        },
        num_hidden_layers=4,
    ),
    "orion": _named(
        "StableLm",
        {**_class("OrionForCausalLM"), "rms_norm_eps": 1e-5},
        partial_rotary_factor=1.0,
    ),
    "solar": _named(
        "Llama",
        {
            **_class("SolarForCausalLM"),
            # A Llama has no skip connections, so these weigh nothing.
            **{"bskcn_1": [0], "bskcn_2": [0], "bskcn_3": [1], "bskcn_4": [1]},
            "bskcn_tv": [0.9, 0.0],
        },
    ),
    "teleflm": _like_granite(
        "TeleFLMForCausalLM",
        {"use_mup": True, "input_mult": 3.0, "output_mult": 1.0}
        | {"mup_scale_factor": 2.0},
        embedding_multiplier=3.0,
        logits_scaling=2.0,
    ),
    "xverse-moe": _softmax_experts(
        "XverseMoeForCausalLM", num_experts=4, moe_top_k=2, num_shared_experts=1
    ),
}
