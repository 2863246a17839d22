"""Hooks of DeepSeek's attention: the form of each forward, and local slots for latents.

Decode is absorbed: queries and latents reach the attention backend, which uses local
slots. A prefill is absorbed if its prefix stays on the ranks, or if a flag forbids
expansion. Every other prefill is expanded by SGLang's code, which reaches the pool through
two methods. `torch_native` is always absorbed.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch

from sglang_dcp.context import find_context
from sglang_dcp.layers.mla import groups
from sglang_dcp.layers.mla.form import (
    PrefillBatch,
    PrefillForm,
    choose_prefill_form,
    groups_of,
)
from sglang_dcp.layers.mla.in_place import absorbs_plainly
from sglang_dcp.layers.prefix.cost import Requests


def mla_forward_method_torch_native(attention: Any, batch: Any) -> Any:
    """Hook: registry entry `torch_native` of DeepSeek; absorbed MLA in every mode.

    In this form K/V reach the pool through the attention backend. On a GPU with DCP off
    it makes SGLang's choice, which for an unregistered backend is the one of `triton`.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    if find_context() is None and torch.cuda.is_available():
        return AttentionBackendRegistry.get_handler("triton")(attention, batch)
    return AttnForwardMethod.MLA


def mla_forward_method_fa3(attention: Any, batch: Any) -> Any:
    """Hook: registry entry `fa3` of DeepSeek; SGLang's choice with DCP off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_fa3, attention, batch, "fa3"
    )


def mla_forward_method_flashinfer(attention: Any, batch: Any) -> Any:
    """Hook: registry entry `flashinfer` of DeepSeek; SGLang's choice with DCP off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_flashinfer,
        attention,
        batch,
        "flashinfer",
    )


def _forward_method(
    original: Callable[[Any, Any], Any], attention: Any, batch: Any, backend: str
) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    if find_context() is None:
        return original(attention, batch)
    # Without a prefix, MHA_CHUNKED_KV is the same as AttnForwardMethod.MHA.
    methods = {
        PrefillForm.ABSORBED: AttnForwardMethod.MLA,
        PrefillForm.NO_PREFIX: AttnForwardMethod.MHA_CHUNKED_KV,
        PrefillForm.ONE_SHOT: AttnForwardMethod.MHA_ONE_SHOT,
        PrefillForm.PREFIX_CHUNKS: AttnForwardMethod.MHA_CHUNKED_KV,
        PrefillForm.BY_GROUP: AttnForwardMethod.MHA_CHUNKED_KV,
    }
    absorbed = backend == "flashinfer" and attention.flashinfer_mla_disable_ragged
    if absorbed or not batch.forward_mode.is_extend_without_speculative():
        return AttnForwardMethod.MLA
    return methods[_prepared_form(attention, batch, backend)]


def _prepared_form(attention: Any, batch: Any, backend: str) -> PrefillForm:
    """Choose the form of a prefill, and set what it needs in SGLang's batch."""
    prefill = _backend().prefill
    form: PrefillForm = prefill.form(
        lambda: choose_prefill_form(
            prefill_batch(batch),
            prefill.sizes,
            expand_prefix=not attention.disable_chunked_prefix_cache,
            by_group=backend in groups.SERVED and absorbs_plainly(attention),
        )
    )
    if form is PrefillForm.BY_GROUP:
        prefill.prepare_groups(
            batch, attention, lambda: groups_of(prefill_batch(batch), prefill.sizes)
        )
    else:
        prefill.prepare(batch, form)
    return form


def prefill_batch(batch: Any) -> PrefillBatch:
    """Return what the choice of a form needs from SGLang's extend batch."""
    return PrefillBatch(Requests.of(batch), batch.get_max_chunk_capacity())


def set_mla_kv_buffer(
    original: Callable[..., None],
    attention: Any,
    latent_cache: torch.Tensor,
    kv_a: torch.Tensor,
    k_pe: torch.Tensor,
    forward_batch: Any,
) -> None:
    """Hook: `DeepseekMHAForwardMixin._set_mla_kv_buffer`; writes latents to local slots."""
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
    """Hook: `DeepseekMHAForwardMixin._get_mla_kv_buffer`; gathers latents of all ranks.

    They are the latents of whole requests, or of the prefix chunk that the batch names.
    `kv_indices` holds logical slots and is not used. A collective over the DCP group.
    """
    if find_context() is None:
        return original(attention, kv_indices, dst_dtype, forward_batch)
    return _backend().prefill.latents(attention.attn_mha, dst_dtype, forward_batch)


def _backend() -> Any:
    """Return the `DcpAttentionBackend` of this forward."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    return get_attn_backend()
