"""Checks of a model as SGLang has built it, before its weights are loaded.

The list of architectures in `models` says what was compared with tp 1. These checks do
not trust a list: they look at each attention layer.
"""

from __future__ import annotations

from typing import Any, Iterator, Optional

from torch import nn

from sglang_dcp.config import DcpConfig
from sglang_dcp.layers.heads import is_mla, kv_head_counts, qkv_layer_of
from sglang_dcp.layers.loading import attentions_of, norms_over_heads
from sglang_dcp.support.quantization import check_replicated_layers
from sglang_dcp.support.rules import raise_unsupported

_SERVE_WITHOUT = "serve this model without DCP"


def check_attention_layers(
    model: nn.Module, model_config: Any, config: DcpConfig
) -> None:
    """Raise `DcpConfigError` for an attention layer that DCP would not serve right.

    Parameters
    ----------
    model : nn.Module
        Built and not loaded.
    model_config
        SGLang's `ModelConfig` with scaled K/V heads.
    config : DcpConfig
    """
    layers = dict(_attention_layers(model))
    if len(layers) < _layers_of(model_config):
        shown = f"{len(layers)} attention layers"
        _raise(model, shown, "its attention does not go through SGLang's layers")
    for name, layer in layers.items():
        if (special := _special(layer)) is not None:
            reason = "a rank's part of the sequence does not hold what it needs"
            _raise(model, f"{name} with {special}", reason)
    if config.replicate_q_proj:
        check_replicated_layers(model, model_config)
    if is_mla(model_config):
        return
    heads = model_config.hf_text_config.num_attention_heads
    _check_head_counts(model, heads, kv_head_counts(model_config)[0], config)
    _check_norms(model, kv_head_counts(model_config)[0], config)


def _layers_of(model_config: Any) -> int:
    """Return how many layers the model has. A draft may be a part of a checkpoint."""
    text = model_config.hf_text_config
    drafted = getattr(text, "num_nextn_predict_layers", None)
    if model_config.is_draft_model and drafted:
        return int(drafted)
    return int(text.num_hidden_layers)


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in model.named_modules():
        if isinstance(module, RadixAttention):
            yield name, module


def _special(layer: Any) -> Optional[str]:
    if layer.is_cross_attention:
        return "cross attention"
    if layer.sliding_window_size > -1:
        return f"sliding_window_size {layer.sliding_window_size}"
    if layer.logit_cap:
        return f"logit_cap {layer.logit_cap}"
    if layer.attn_type.value != "decoder":
        return f"attn_type {layer.attn_type.value}"
    return None


def _check_head_counts(
    model: nn.Module, heads: int, kv_heads: int, config: DcpConfig
) -> None:
    layout = config.layout
    local, local_kv = heads // layout.tp_size, layout.kv_heads_per_rank(kv_heads)
    cut = set()
    for module in model.modules():
        qkv: Any = qkv_layer_of(module)
        for layer in attentions_of(module):
            cut.add(layer)
            found = (layer.tp_q_head_num, layer.tp_k_head_num, layer.tp_v_head_num)
            if found != (local, local_kv, local_kv):
                want = f"({local}, {local_kv}, {local_kv})"
                _raise(model, f"Q, K, V heads {found}", f"this layout needs {want}")
            if (qkv.total_num_heads, qkv.total_num_kv_heads) != (heads, kv_heads):
                _raise(
                    model,
                    f"a QKV layer with {qkv.total_num_kv_heads} K/V heads",
                    f"the model config names {kv_heads}",
                )
    for name, layer in _attention_layers(model):
        if layer not in cut:
            _raise(model, name, "it gets its K/V heads from no QKV layer of SGLang")


def _check_norms(model: nn.Module, kv_heads: int, config: DcpConfig) -> None:
    layout = config.layout
    for module in model.modules():
        for layer in attentions_of(module):
            norms = norms_over_heads(module, layer.qk_head_dim)
            if norms and config.replicate_q_proj:
                raise_unsupported(
                    "--dcp-replicate-q-proj",
                    f"with {type(model).__name__}",
                    "its Q norm has weights for the heads of one rank or of all",
                    "drop the flag",
                )
            whole = kv_heads * layout.dcp_size * layer.qk_head_dim
            if kv_heads < layout.attn_tp_size and any(
                norm.numel() == whole and not hasattr(norm, "weight_loader")
                for norm in norms
            ):
                raise_unsupported(
                    "--attn-tp-size",
                    f"{layout.attn_tp_size} with {type(model).__name__}",
                    "its K norm takes each K/V head of the model once",
                    f"use --attn-tp-size {kv_heads} or less",
                )


def _raise(model: nn.Module, what: str, reason: str) -> None:
    shown = f"{type(model).__name__} ({what})"
    raise_unsupported("--model-path", shown, reason, _SERVE_WITHOUT)
