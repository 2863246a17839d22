"""The models that DCP supports, and the checks that run before a weight is loaded."""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.layers.heads import is_mla
from sglang_dcp.support.architectures import (
    DP_ATTENTION,
    DRAFT_ARCHITECTURES,
    LOADED_AS_LLAMA,
    NORMS_OVER_HEADS,
    ONE_RANK_IN_SGLANG,
    SERVED,
    SERVED_BEFORE_0_5_23,
    served,
)
from sglang_dcp.support.quantization import (
    CUTS_BY_RANK,
    is_unknown,
    quantization_config,
)
from sglang_dcp.support.quantized_layers import int8_experts, packed_latents
from sglang_dcp.support.rules import Unsupported, check_rules, raise_unsupported


def _named(model: Any, what: str) -> str:
    return f"{_name(model)} ({what})"


def _name(model: Any) -> str:
    return (model.hf_config.architectures or ["?"])[0]


def _sinks(model: Any) -> Optional[str]:
    return _named(model, "attention sinks") if model.has_attention_sinks else None


def _windowed(model: Any) -> Optional[str]:
    text = model.hf_text_config
    layers = getattr(text, "layer_types", None) or ()
    if model.is_hybrid_swa or any("sliding" in kind for kind in layers):
        return _named(model, "sliding window layers")
    used = getattr(text, "use_sliding_window", True)
    window = getattr(text, "sliding_window", None)
    # As long as the context, it hides nothing. Phi-3 names such a window.
    if not used or not window or window >= model.context_len:
        return None
    return _named(model, f"sliding_window {window}")


def _layer_kinds(model: Any) -> Optional[str]:
    kinds = {*(getattr(model.hf_text_config, "layer_types", None) or ())}
    others = sorted(kinds - {"full_attention"})
    return _named(model, f"layer_types {' '.join(others)}") if others else None


def _encoder_decoder(model: Any) -> Optional[str]:
    return _named(model, "cross attention") if model.is_encoder_decoder else None


def _sparse(model: Any) -> Optional[str]:
    """Sparse attention (DSA) may also come under the architecture of DeepSeek-V3."""
    topk = getattr(model.hf_text_config, "index_topk", None)
    return None if topk is None else _named(model, f"index_topk {topk}")


def _dense_layers(model: Any) -> Optional[str]:
    """SGLang makes every layer of Qwen's MoE one of experts, and drops weights silently."""
    if _name(model) not in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        return None
    text = model.hf_text_config
    if dense := getattr(text, "mlp_only_layers", None):
        return _named(model, f"mlp_only_layers {dense}")
    step = getattr(text, "decoder_sparse_step", 1)
    return None if step == 1 else _named(model, f"decoder_sparse_step {step}")


def _mlp_bias(model: Any) -> Optional[str]:
    """SGLang's Llama has no biases there, and drops those of a checkpoint silently."""
    biased = getattr(model.hf_text_config, "mlp_bias", False)
    return _named(model, "mlp_bias") if biased else None


def _scaled_queries(model: Any) -> Optional[str]:
    """MistralLarge3's queries may also come under the architecture of DeepSeek-V3."""
    scaling = getattr(model.hf_text_config, "llama_4_scaling", None)
    return None if scaling is None else _named(model, "llama_4_scaling")


def _block_scales(model: Any) -> Optional[str]:
    """The loader of Llama renames scales of fp8 blocks, and then finds no place for them."""
    if _name(model) not in LOADED_AS_LLAMA or model.quantization != "fp8":
        return None
    size = quantization_config(model).get("weight_block_size")
    return _named(model, f"weight_block_size {size}") if size else None


def _cuts_by_rank(model: Any) -> Optional[str]:
    name = model.quantization
    return _named(model, name) if name in CUTS_BY_RANK else None


def _unknown_format(model: Any) -> Optional[str]:
    name = model.quantization
    return _named(model, name) if is_unknown(name) else None


def _packed_latents(model: Any) -> Optional[str]:
    found = packed_latents(model)
    return _named(model, found) if found else None


def _int8_experts(model: Any) -> Optional[str]:
    found = int8_experts(model)
    return _named(model, found) if found else None


def _architecture(model: Any) -> Optional[str]:
    name = _name(model)
    drafts = DRAFT_ARCHITECTURES if model.is_draft_model else ()
    return None if name in served() + drafts else name


def _one_rank(model: Any) -> Optional[str]:
    name = _name(model)
    return name if name in ONE_RANK_IN_SGLANG else None


UNSUPPORTED_MODELS: tuple[Unsupported, ...] = (
    Unsupported(
        "--model-path",
        _encoder_decoder,
        "encoder keys are not in the sharded pool",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _sinks,
        "each shard would add the sink once",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _windowed,
        "a window needs positions that a rank's local table does not hold",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _sparse,
        "sparse attention (DSA) picks its keys from an index over the whole sequence",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _dense_layers,
        "SGLang itself leaves the weights of its dense layers out",
        "serve this model by another engine",
    ),
    Unsupported(
        "--model-path",
        _mlp_bias,
        "SGLang itself leaves these biases out",
        "serve this model by another engine",
    ),
    Unsupported(
        "--model-path",
        _scaled_queries,
        "SGLang itself scales these queries on some attention backends alone",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _block_scales,
        "SGLang itself leaves the scales of its fp8 blocks out",
        "serve this model with another quantization",
    ),
    Unsupported(
        "--model-path",
        _cuts_by_rank,
        "its loader cuts K/V rows by tensor-parallel rank",
        "serve this model with another quantization",
    ),
    Unsupported(
        "--model-path",
        _unknown_format,
        "its loader was made for other devices, or by another SGLang than is known",
        "serve this model with another quantization",
    ),
    Unsupported(
        "--model-path",
        _packed_latents,
        "SGLang itself cannot derive the K weights of latent attention from it",
        "serve this model with kv_b_proj in 16 bit, or with another quantization",
    ),
    Unsupported(
        "--model-path",
        _int8_experts,
        "SGLang itself has such experts for NPUs alone",
        "serve this model with another quantization",
    ),
    Unsupported(
        "--model-path",
        _layer_kinds,
        "only layers of full attention can work on a part of the sequence",
        "serve this model without DCP",
    ),
    Unsupported(
        "--model-path",
        _one_rank,
        "SGLang itself cannot run it with --tp-size above 1",
        "serve this model with --tp-size 1",
    ),
    *(
        Unsupported(
            "--model-path",
            _architecture,
            "DCP supports only " + ", ".join(names),
            "serve this model without DCP",
            *releases,
        )
        for names, releases in (
            (SERVED_BEFORE_0_5_23, (None, "0.5.23")),
            (SERVED, ("0.5.23", None)),
        )
    ),
)


def check_model(model: Any, config: DcpConfig) -> None:
    """Raise `DcpConfigError` for a model that DCP does not support.

    It runs before a weight is loaded. `model` is SGLang's `ModelConfig` as read from disk,
    with K/V heads that are not scaled yet.
    """
    check_rules(UNSUPPORTED_MODELS, model)
    if config.layout.replicas > 1 and _name(model) not in DP_ATTENTION:
        raise_unsupported(
            "--enable-dp-attention",
            f"with {_name(model)}",
            "SGLang itself shards its attention over all ranks of --tp-size",
            "use --dp-size replicas without DP attention, or one of "
            + ", ".join(DP_ATTENTION),
        )
    heads = model.hf_text_config.num_attention_heads
    kv_heads = 1 if is_mla(model) else model.get_total_num_kv_heads()
    try:
        config.layout.check_heads(heads, kv_heads)
    except ValueError as error:
        raise DcpConfigError(str(error)) from None
    if config.replicate_q_proj:
        _check_replicated_q(model)


def _check_replicated_q(model: Any) -> None:
    flag, hint = "--dcp-replicate-q-proj", "drop the flag"
    normed = getattr(model.hf_text_config, "use_qk_norm", True)
    if normed and _name(model) in NORMS_OVER_HEADS:
        reason = "its Q norm has weights for the heads of one rank or of all"
        raise_unsupported(flag, f"with {_name(model)}", reason, hint)
