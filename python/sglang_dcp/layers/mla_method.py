"""How DeepSeek's attention is computed on the GPU backends: absorbed, in every mode.

Absorbed, queries and latents reach the attention backend, which writes and reads them by
local slots. SGLang's other ways expand the latents of a prefix, by logical slots, itself.
"""

from __future__ import annotations

from typing import Any, Callable

from sglang_dcp.context import find_context


def mla_forward_method_fa3(attention: Any, batch: Any) -> Any:
    """Seam: registry entry `fa3` of DeepSeek; SGLang's own choice where DCP is off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_fa3, attention, batch
    )


def mla_forward_method_flashinfer(attention: Any, batch: Any) -> Any:
    """Seam: registry entry `flashinfer`; SGLang's own choice where DCP is off."""
    from sglang.srt.models.deepseek_common import attention_backend_handler

    return _forward_method(
        attention_backend_handler.handle_attention_flashinfer, attention, batch
    )


def _forward_method(
    original: Callable[[Any, Any], Any], attention: Any, batch: Any
) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    if find_context() is None:
        return original(attention, batch)
    return AttnForwardMethod.MLA
