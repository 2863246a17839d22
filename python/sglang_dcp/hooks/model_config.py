"""Hooks of a model's config and of the model that SGLang builds from it."""

from __future__ import annotations

from typing import Any, Callable

from sglang_dcp.config import dcp_of


def model_config_from_server_args(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook: `ModelConfig.from_server_args`; it runs before any weight is loaded.

    Raises
    ------
    DcpConfigError
        DCP does not support the model.
    """
    from sglang_dcp.hooks.server_args import drop_prefill_graphs
    from sglang_dcp.layers.heads import is_scaled, scale_kv_heads
    from sglang_dcp.support.models import check_model
    from sglang_dcp.support.prefill_graphs import needs_eager_prefill
    from sglang_dcp.support.quantization import check_replicated_q

    model = original(server_args, *args, **kwargs)
    config = dcp_of(server_args)
    if config is not None and not is_scaled(model):
        check_model(model, config)
        if config.replicate_q_proj:
            check_replicated_q(model, server_args.device)
        scale_kv_heads(model, config)
        if needs_eager_prefill(model, config, server_args):
            drop_prefill_graphs(server_args)
    return model


def initialize_model(result: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: `_initialize_model`; the model is built, and its weights are not loaded.

    Raises
    ------
    DcpConfigError
        The model has an attention layer that DCP does not support.
    """
    from sglang_dcp.context import find_context
    from sglang_dcp.layers.loading import prepare_loading, refuse_export
    from sglang_dcp.layers.q_replication import replicate_q_projections
    from sglang_dcp.support.attention_layers import check_attention_layers

    context = find_context()
    if context is not None:
        replicated_q = context.config.replicate_q_proj
        check_attention_layers(result, model_config, context.config)
        prepare_loading(result, model_config, context.config.layout)
        refuse_export(result, model_config, replicated_q=replicated_q)
        if replicated_q:
            replicate_q_projections(result, context)
    return result
