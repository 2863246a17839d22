"""Models that DCP cannot shard, refused before a weight is loaded."""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.refusals import Refusal, check_table, refuse

# Built with the model-agnostic head sharding and compared with tp 1 in test/srt.
GQA_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
MLA_ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
)


def _sinks(model: Any) -> Optional[str]:
    return "attention sinks" if model.has_attention_sinks else None


def _windowed(model: Any) -> Optional[str]:
    text = model.hf_text_config
    layers = getattr(text, "layer_types", None) or ()
    if model.is_hybrid_swa or any("sliding" in kind for kind in layers):
        return "sliding window layers"
    used = getattr(text, "use_sliding_window", True)
    window = getattr(text, "sliding_window", None)
    return f"sliding_window {window}" if used and window else None


def _encoder_decoder(model: Any) -> Optional[str]:
    return "cross attention" if model.is_encoder_decoder else None


def _sparse(model: Any) -> Optional[str]:
    """DSA comes under its own architectures, and under DeepSeek-V3's."""
    name = (model.hf_config.architectures or ["?"])[0]
    topk = getattr(model.hf_text_config, "index_topk", None)
    return None if topk is None else f"{name}, index_topk {topk}"


def _architecture(model: Any) -> Optional[str]:
    known = GQA_ARCHITECTURES + MLA_ARCHITECTURES
    name = (model.hf_config.architectures or ["?"])[0]
    return None if name in known else name


MODEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--model-path",
        _encoder_decoder,
        "encoder keys are not in the sharded pool",
        "serve this model without DCP",
    ),
    Refusal(
        "--model-path",
        _sinks,
        "each shard would add the sink once",
        "serve this model without DCP",
    ),
    Refusal(
        "--model-path",
        _windowed,
        "a window needs positions that a shard's own table does not hold",
        "serve this model without DCP",
    ),
    Refusal(
        "--model-path",
        _sparse,
        "sparse attention (DSA) picks its keys from an index over the whole sequence",
        "serve this model without DCP",
    ),
    Refusal(
        "--model-path",
        _architecture,
        "models with DCP are " + ", ".join(GQA_ARCHITECTURES + MLA_ARCHITECTURES),
        "serve this model without DCP",
    ),
)


def check_model(model: Any, config: DcpConfig) -> None:
    """Refuse a model whose attention DCP cannot shard, before a weight is loaded.

    `model` is SGLang's `ModelConfig` as read from disk: KV heads not yet scaled.
    """
    check_table(MODEL_REFUSALS, model)
    heads = model.hf_text_config.num_attention_heads
    kv_heads = 1 if is_mla(model) else model.get_total_num_kv_heads()
    try:
        config.layout.check_heads(heads, kv_heads)
    except ValueError as error:
        raise DcpConfigError(str(error)) from None
    if config.replicate_q_proj and model.quantization is not None:
        refuse(
            "--dcp-replicate-q-proj",
            f"with quantization {model.quantization}",
            "only unquantized Q projections can be held at attn_tp width",
            "drop the flag",
        )


def is_mla(model: Any) -> bool:
    """Whether SGLang will serve `model` with latent (MLA) attention."""
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA
