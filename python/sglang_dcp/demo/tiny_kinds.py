"""The kinds of tiny checkpoints: their models and sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TinyModel:
    """One kind: a transformers config class and its sizes.

    ``extra`` holds keys that SGLang reads from config.json and transformers does not
    write. Weights and norms are drawn with the standard deviations ``*_std``.
    """

    config_class: str
    architecture: str
    sizes: Mapping[str, Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    weight_std: float = 0.12
    norm_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        """Number of heads in the KV cache. MLA keeps one latent for all of them."""
        latent = "kv_lora_rank" in self.sizes
        return 1 if latent else int(self.sizes["num_key_value_heads"])


def _gqa(q_heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
        **more,
    }


def _llama(q_heads: int, kv_heads: int, **more: Any) -> TinyModel:
    return TinyModel("LlamaConfig", "LlamaForCausalLM", _gqa(q_heads, kv_heads, **more))


def _mla(first_dense: int, q_lora_rank: int | None, **more: Any) -> TinyModel:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "first_k_dense_replace": first_dense,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        **more,
    }
    greedy = {"topk_method": "greedy"}
    extra = {"moe_layer_freq": 1, "scoring_func": "softmax"}
    return TinyModel(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", {**sizes, **greedy}, extra
    )


def _mla_v3(**more: Any) -> TinyModel:
    """DeepSeek-V3: sigmoid scores with a correction bias, and always a low-rank Q."""
    extra = {
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    sizes = {**_mla(1, 48, **more).sizes, "norm_topk_prob": True}
    del sizes["topk_method"]
    return TinyModel("DeepseekV3Config", "DeepseekV3ForCausalLM", sizes, extra)


def _mla_glm(q_heads: int, **more: Any) -> TinyModel:
    """GLM-4.7-Flash: DeepSeek-V3's attention, but V is wider than the unrotated part of Q."""
    heads = {"num_attention_heads": q_heads, "num_key_value_heads": q_heads}
    sizes = dict(_mla_v3(**heads, **more).sizes)
    # transformers wants a list, SGLang a number.
    dense = sizes.pop("first_k_dense_replace")
    sparse = sizes["num_hidden_layers"] - dense
    sizes["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * sparse
    extra = {"first_k_dense_replace": dense}
    return TinyModel("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", sizes, extra)


# Sizes of MLA that GPU kernels take. Every DeepSeek model has them.
_MLA_D512 = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


# Sizes of GLM: head dim 256 of Q and K, and 256 of V.
_MLA_D512_WIDE = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
}


def _qwen3_moe(q_heads: int, kv_heads: int, **more: Any) -> TinyModel:
    sizes = _gqa(
        q_heads,
        kv_heads,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        **more,
    )
    return TinyModel("Qwen3MoeConfig", "Qwen3MoeForCausalLM", sizes)


KINDS: Mapping[str, TinyModel] = {
    "llama-1kv": _llama(8, 1),
    "llama-2kv": _llama(8, 2),
    "llama-8kv": _llama(16, 8),
    # Head dims that 16-bit GPU kernels take.
    "llama-1kv-d128": _llama(8, 1, head_dim=128),
    "llama-2kv-d128": _llama(8, 2, head_dim=128),
    "llama-8kv-d64": _llama(16, 8, head_dim=64),
    # 12 query heads share 3 K/V heads: the query heads of one rank of two span one and a
    # half K/V heads.
    "llama-odd": _llama(12, 3, hidden_size=240),
    "qwen2": TinyModel("Qwen2Config", "Qwen2ForCausalLM", _gqa(8, 2)),
    "qwen3": TinyModel("Qwen3Config", "Qwen3ForCausalLM", _gqa(8, 2)),
    "qwen3-moe": _qwen3_moe(8, 2),
    "qwen3-moe-d128": _qwen3_moe(16, 4, head_dim=128),
    "mla-dense": _mla(first_dense=3, q_lora_rank=None),
    "mla-moe": _mla(first_dense=1, q_lora_rank=48),
    "mla-moe-d512": _mla(first_dense=1, q_lora_rank=None, **_MLA_D512),
    "mla-v3": _mla_v3(),
    "mla-v3-d512": _mla_v3(**_MLA_D512),
    # SGLang's kernel for the two norms of an MTP layer takes hidden sizes above 256.
    "mla-v3-d512-h512": _mla_v3(hidden_size=512, **_MLA_D512),
    "mla-glm": _mla_glm(12, v_head_dim=48),
    "mla-glm-d512": _mla_glm(20, **_MLA_D512_WIDE),
}
