"""K/V heads sharded over attn_tp ranks instead of tp ranks, without changes to models.

Models, pool sizing and attention backends divide the K/V-head count by the
tensor-parallel size. They see `kv_heads * dcp_size` heads, so each of them gets
`kv_heads / attn_tp_size`. Only the weight loader needs the true count.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable, Optional

import torch

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, find_context
from sglang_dcp.releases.api import sglang_api

_MARK = "dcp_kv_head_scale"


def is_mla(model: Any) -> bool:
    """Whether SGLang serves `model`, a `ModelConfig`, with latent attention (MLA)."""
    from sglang.srt.configs.model_config import AttentionArch

    return model.attention_arch == AttentionArch.MLA


def is_scaled(model: Any) -> bool:
    """Whether `scale_kv_heads` has run for `model`: SGLang builds its config many times."""
    return getattr(model.hf_text_config, _MARK, None) is not None


def scale_kv_heads(model: Any, config: DcpConfig) -> None:
    """Multiply the K/V-head count of `model` by `dcp_size`; a repeat changes nothing.

    MLA stays as it is: it has one latent head, which SGLang never shards.
    """
    if is_scaled(model):
        return
    setattr(model.hf_text_config, _MARK, config.dcp_size)
    if is_mla(model):
        return
    seen = model.get_total_num_kv_heads() * config.dcp_size
    holders = (model, model.hf_config, model.hf_text_config)
    for holder in {id(h): h for h in holders}.values():
        if hasattr(holder, "num_key_value_heads"):
            holder.num_key_value_heads = seen


def kv_head_counts(model: Any) -> tuple[int, int]:
    """Return the K/V heads of the checkpoint, and those that SGLang's code sees.

    `model` is a `ModelConfig` after `scale_kv_heads`, and has no latent attention.
    """
    seen = model.get_total_num_kv_heads()
    return seen // getattr(model.hf_text_config, _MARK), seen


def qkv_layer_of(module: Any) -> Optional[Any]:
    """Return the QKV layer right below `module`, or None."""
    from sglang.srt.layers.linear import QKVParallelLinear

    found = [c for c in module.children() if isinstance(c, QKVParallelLinear)]
    return found[0] if found else None


def qkv_parallel_linear_init(
    original: Callable[..., None], self: Any, *args: Any, **kwargs: Any
) -> None:
    """Hook: `QKVParallelLinear.__init__`; ranks of a DCP group load the same K/V heads.

    The loaders slice a checkpoint by `tp_rank // num_kv_head_replicas`. With
    `--dcp-replicate-q-proj` the layer has attn_tp width instead: there the ranks of a DCP
    group load the same Q heads too, and nothing else differs between them.

    Raises
    ------
    RuntimeError
        The layer did not take its K/V-head count from the scaled config. It would load
        wrong heads.
    """
    context = find_context()
    if context is None:
        original(self, *args, **kwargs)
        return
    config = context.config
    if config.replicate_q_proj:
        call = inspect.signature(original).bind(self, *args, **kwargs).arguments
        seen = call.get("total_num_kv_heads") or call["total_num_heads"]
        call["total_num_kv_heads"] = _true_kv_heads(seen, config.dcp_size)
        call.update(attn_tp_partition(context))
        original(**call)
    else:
        original(self, *args, **kwargs)
        seen = self.total_num_kv_heads
        self.total_num_kv_heads = _true_kv_heads(seen, config.dcp_size)
        self.num_kv_head_replicas *= config.dcp_size
    width = config.attn_tp_size if config.replicate_q_proj else config.tp_size
    for parameter in self.parameters():
        if getattr(parameter, "is_gguf_weight", False):
            replicas = self.num_kv_head_replicas
            _repeat_gguf_heads(parameter, width // replicas, replicas)


def attn_tp_partition(context: DcpContext) -> dict[str, Any]:
    """Return what gives an attention layer the width attn_tp, for its constructor."""
    config = context.config
    return sglang_api().attn_tp_partition(
        context.attn_tp_rank, config.attn_tp_size, config.dcp_size
    )


def _true_kv_heads(seen: int, scale: int) -> int:
    if seen % scale:
        raise RuntimeError(
            f"a QKV layer with {seen} K/V heads did not take them "
            f"from the model config that DCP scaled by {scale}"
        )
    return seen // scale


def repeat_heads(rows: torch.Tensor, shards: int, replicas: int) -> torch.Tensor:
    """Repeat each of `shards` equal blocks of `rows` `replicas` times, one after another.

    `rows` is [rows, ...], with the heads of the checkpoint in their order. A cut of the
    result into `shards * replicas` parts then gives consecutive ranks the same heads.
    """
    blocks = rows.unflatten(0, (shards, -1))
    return blocks.repeat_interleave(replicas, dim=0).flatten(0, 1)


def _repeat_gguf_heads(parameter: Any, shards: int, replicas: int) -> None:
    """Let the loader of a GGUF weight give `replicas` consecutive ranks the same K/V heads.

    SGLang cuts the rows of K and V, [rows, bytes], into one part for each rank, whether
    ranks share heads or not.
    """
    load = parameter.weight_loader

    def load_repeated(
        target: Any, rows: torch.Tensor, shard_id: Optional[str] = None
    ) -> None:
        if shard_id in ("k", "v"):
            rows = repeat_heads(rows, shards, replicas)
        load(target, rows, shard_id)

    parameter.weight_loader = load_repeated
