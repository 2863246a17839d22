"""The architectures that DCP serves: those whose models were compared with tp 1.

The comparisons are in `test/srt/ranks/test_models.py` and `test/srt/server`. Whatever is
listed here, `attention_layers` looks at each attention layer that SGLang builds.
"""

from __future__ import annotations

from sglang_dcp.releases.installed import in_range, sglang_version

GQA_ARCHITECTURES: tuple[str, ...] = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "ApertusForCausalLM",
    "ArceeForCausalLM",
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "CohereForCausalLM",
    "DeepseekForCausalLM",
    "Ernie4_5_ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "ExaoneForCausalLM",
    "GemmaForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HYV3ForCausalLM",
    "InternLM2ForCausalLM",
    "InternLM3ForCausalLM",
    "IQuestCoderForCausalLM",
    "MiMoForCausalLM",
    "MiniCPMForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "NanbeigeForCausalLM",
    "Olmo2ForCausalLM",
    "OrionForCausalLM",
    "Phi3ForCausalLM",
    "PhiMoEForCausalLM",
    "Qwen2MoeForCausalLM",
    "SolarForCausalLM",
    "StableLmForCausalLM",
    "TeleFLMForCausalLM",
    "XverseForCausalLM",
    "XverseMoeForCausalLM",
)

MLA_ARCHITECTURES: tuple[str, ...] = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
)

# Compared on SGLang 0.5.23 only.
SINCE_0_5_23: tuple[str, ...] = (
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "DeepseekForCausalLM",
    "ExaoneForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HYV3ForCausalLM",
    "InternLM2ForCausalLM",
    "MiniCPMForCausalLM",
    "NanbeigeForCausalLM",
    "OrionForCausalLM",
    "SolarForCausalLM",
    "TeleFLMForCausalLM",
    "XverseMoeForCausalLM",
)
SERVED = GQA_ARCHITECTURES + MLA_ARCHITECTURES
SERVED_BEFORE_0_5_23 = tuple(name for name in SERVED if name not in SINCE_0_5_23)


def served() -> tuple[str, ...]:
    """Return the architectures that are served on the installed release of SGLang."""
    is_new = in_range(sglang_version(), "0.5.23", None)
    return SERVED if is_new else SERVED_BEFORE_0_5_23


# Draft models of these, beside any model above as a draft.
DRAFT_ARCHITECTURES: tuple[str, ...] = (
    "LlamaForCausalLMEagle",
    "LlamaForCausalLMEagle3",
    "DeepseekV3ForCausalLMNextN",
)

# SGLang shards their attention over the ranks of a replica of DP attention. It shards the
# attention of the others over all ranks, which then hold different requests.
DP_ATTENTION: tuple[str, ...] = (
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

# Their Q norm has weights for the heads of one rank or of all. Cohere's has them only if
# the model config asks for that norm.
NORMS_OVER_HEADS: tuple[str, ...] = (
    "CohereForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Olmo2ForCausalLM",
)

# SGLang loads them by the code of its Llama.
LOADED_AS_LLAMA: tuple[str, ...] = (
    "LlamaForCausalLM",
    "InternLM3ForCausalLM",
    "IQuestCoderForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "TeleFLMForCausalLM",
)

# OLMoE norms Q and K of one rank with the weights of all heads. Starcoder2 takes a rank
# for the number of its pipeline stage.
ONE_RANK_IN_SGLANG: tuple[str, ...] = ("OlmoeForCausalLM", "Starcoder2ForCausalLM")
