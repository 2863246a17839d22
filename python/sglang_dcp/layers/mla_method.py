"""How DeepSeek's attention is computed on the GPU backends, and on whose slots.

Decode is absorbed: queries and latents reach the attention backend, which writes and
reads them by local slots. So is a prefill whose prefix stays in place, or which a flag
forbids to expand. In any other, SGLang expands latents to heads itself, and two of its
methods meet the pool. `torch_native` is absorbed throughout (its adaptor's file).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

from sglang_dcp.context import find_context
from sglang_dcp.layers.latent_gather import gathering_moves_less

if TYPE_CHECKING:
    import torch

    from sglang_dcp.layers.attention import DcpAttentionBackend

# Of Q and K, and of V: what the kernels of both backends are made for, and checked.
MHA_HEAD_DIMS = (192, 128)


def mla_forward_method_fa3(attention: Any, batch: Any) -> Any:
    """Seam: registry entry `fa3` of DeepSeek; SGLang's own choice where DCP is off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_fa3, attention, batch, False
    )


def mla_forward_method_flashinfer(attention: Any, batch: Any) -> Any:
    """Seam: registry entry `flashinfer`; SGLang's own choice where DCP is off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_flashinfer,
        attention,
        batch,
        attention.flashinfer_mla_disable_ragged,
    )


def _forward_method(
    original: Callable[[Any, Any], Any], attention: Any, batch: Any, absorbed: bool
) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    context = find_context()
    if context is None:
        return original(attention, batch)
    if absorbed or not _expands(attention, batch, context.config.dcp_size):
        return AttnForwardMethod.MLA
    if not any(batch.extend_prefix_lens_cpu):
        # Without a prefix, the same as AttnForwardMethod.MHA.
        return AttnForwardMethod.MHA_CHUNKED_KV
    one_shot = _backend().prefill.prepare(batch)
    return (
        AttnForwardMethod.MHA_ONE_SHOT if one_shot else AttnForwardMethod.MHA_CHUNKED_KV
    )


def _expands(attention: Any, batch: Any, dcp_size: int) -> bool:
    """Whether a forward is a prefill by MHA; the same on all ranks.

    SGLang's measure, 8192 positions of prefix, knows nothing of what an exchange carries.
    """
    if not batch.forward_mode.is_extend_without_speculative():
        return False
    if (attention.qk_head_dim, attention.v_head_dim) != MHA_HEAD_DIMS:
        return False
    prefix, new = sum(batch.extend_prefix_lens_cpu), sum(batch.extend_seq_lens_cpu)
    if not prefix:
        return True
    return not attention.disable_chunked_prefix_cache and gathering_moves_less(
        prefix + new,
        new,
        shard_heads=attention.num_local_heads * dcp_size,
        latent=attention.kv_lora_rank,
        rope=attention.qk_rope_head_dim,
    )


def set_mla_kv_buffer(
    original: Callable[..., None],
    attention: Any,
    latent_cache: torch.Tensor,
    kv_a: torch.Tensor,
    k_pe: torch.Tensor,
    forward_batch: Any,
) -> None:
    """Seam: `DeepseekMHAForwardMixin._set_mla_kv_buffer`, new latents to local slots."""
    if find_context() is None:
        original(attention, latent_cache, kv_a, k_pe, forward_batch)
        return
    _backend().write_latents(attention.attn_mha, kv_a.unsqueeze(1), k_pe)


def get_mla_kv_buffer(
    original: Callable[..., Any],
    attention: Any,
    kv_indices: Optional[torch.Tensor],
    dst_dtype: torch.dtype,
    forward_batch: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seam: `DeepseekMHAForwardMixin._get_mla_kv_buffer`, latents from all ranks.

    Of whole requests, or of a piece of their prefixes, which is known by its number:
    `kv_indices`, logical slots, says nothing.
    """
    if find_context() is None:
        return original(attention, kv_indices, dst_dtype, forward_batch)
    return _backend().prefill.latents(attention.attn_mha, dst_dtype, forward_batch)


def _backend() -> DcpAttentionBackend:
    from sglang.srt.model_executor.forward_context import get_attn_backend

    return get_attn_backend()
