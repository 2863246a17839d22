"""Hook of SGLang's `ModelConfig`: checks the model and scales its K/V-head count."""

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
    from sglang_dcp.layers.heads import is_scaled, scale_kv_heads
    from sglang_dcp.support.models import check_model

    model = original(server_args, *args, **kwargs)
    config = dcp_of(server_args)
    if config is not None and not is_scaled(model):
        check_model(model, config)
        scale_kv_heads(model, config)
    return model
