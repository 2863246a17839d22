"""K/V heads sharded over attn_tp ranks instead of tp ranks, without model edits.

Every reader of the KV-head count divides it by the tensor-parallel width: models, pool
sizing, attention backends. They see `kv_heads * dcp_size` heads, so that each of them
arrives at `kv_heads / attn_tp_size`. Only the weight loader needs the truth.
"""

from __future__ import annotations

from typing import Any, Callable

from sglang_dcp.config import DcpConfig, dcp_of
from sglang_dcp.context import find_context

_MARK = "dcp_kv_head_scale"


def model_config_from_server_args(
    original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """Seam: `ModelConfig.from_server_args`; refuses models that cannot be sharded.

    Raises
    ------
    DcpConfigError
        Before any weight is loaded, for a model that DCP does not support.
    """
    model = original(server_args, *args, **kwargs)
    config = dcp_of(server_args)
    if config is not None:
        scale_kv_heads(model, config)
    return model


def scale_kv_heads(model: Any, config: DcpConfig) -> None:
    """Show `model`'s KV heads `dcp_size` times over; idempotent, as SGLang calls often.

    MLA has one latent head, which SGLang never shards: left alone.
    """
    from sglang_dcp.model_refusals import check_model, is_mla

    if getattr(model.hf_text_config, _MARK, None) is not None:
        return
    check_model(model, config)
    setattr(model.hf_text_config, _MARK, config.dcp_size)
    if is_mla(model):
        return
    seen = model.get_total_num_kv_heads() * config.dcp_size
    holders = (model, model.hf_config, model.hf_text_config)
    for holder in {id(h): h for h in holders}.values():
        if hasattr(holder, "num_key_value_heads"):
            holder.num_key_value_heads = seen


def qkv_parallel_linear_init(
    original: Callable[..., None], self: Any, *args: Any, **kwargs: Any
) -> None:
    """Seam: `QKVParallelLinear.__init__`; ranks of a KVP group load the same K/V heads.

    The loaders cut a checkpoint by `tp_rank // num_kv_head_replicas`.
    """
    original(self, *args, **kwargs)
    context = find_context()
    if context is None:
        return
    scale = context.config.dcp_size
    if self.total_num_kv_heads % scale:
        raise RuntimeError(
            f"a QKV layer with {self.total_num_kv_heads} K/V heads did not take them "
            f"from the model config that DCP scaled by {scale}"
        )
    self.total_num_kv_heads //= scale
    self.num_kv_head_replicas *= scale
