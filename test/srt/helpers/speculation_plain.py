"""Draft heads on plain SGLang's `torch_native`, which has none: the reference on a CPU.

SGLang's backend lacks the steps of a draft and the lengths of a verification. Both are
added to its own attention, without anything of this package. Drafts are chains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Optional

import torch

_BACKEND = "torch_native"
_PLACES = {
    "create_backend": "sglang.srt.speculative.draft_utils.DraftBackendFactory"
    "._create_backend",
    "forward_extend": "sglang.srt.layers.attention.torch_native_backend"
    ".TorchNativeAttnBackend.forward_extend",
}


def install() -> None:
    """Put the functions around SGLang's, from a plugin's `load`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, place in _PLACES.items():
        HookRegistry.register(place, globals()[name], HookType.AROUND)


class PlainSteps:
    """What SGLang calls a multi-step draft backend; it needs no plan."""

    needs_cpu_seq_lens = False
    forward_metadata: Optional[object] = None
    prefill_attention_backend_str = decode_attention_backend_str = _BACKEND

    def __init__(self, backends: list[Any]) -> None:
        self.attn_backends = backends

    def init_forward_metadata(self, forward_batch: Any) -> None: ...


def create_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Steps of a draft. For its extensions None: SGLang then takes the runner's backend."""
    from sglang.srt.runtime_context import attention_backends

    if attention_backends() != (_BACKEND, _BACKEND):
        return original(factory, backend_name, backend_map, *args, **kwargs)
    if not backend_name.startswith("decode"):
        return None
    steps = range(factory.speculative_num_steps - 1)
    return PlainSteps([_step(factory.draft_model_runner, step) for step in steps])


def _step(runner: Any, step: int) -> Any:
    """SGLang's backend for one step. The batch has the lengths before the first step."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class PlainStep(TorchNativeAttnBackend):
        def forward_decode(
            self,
            q: Any,
            k: Any,
            v: Any,
            layer: Any,
            batch: Any,
            *args: Any,
            **more: Any,
        ) -> Any:
            longer = copy.copy(batch)
            longer.seq_lens = batch.seq_lens + step + 1
            return super().forward_decode(q, k, v, layer, longer, *args, **more)

    return PlainStep(runner)


def forward_extend(
    original: Callable[..., Any],
    backend: Any,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    forward_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A verification extends each request by its drafts, which no length of it counts."""
    batch = forward_batch
    if batch.forward_mode.is_target_verify():
        batch = copy.copy(forward_batch)
        width = forward_batch.spec_info.draft_token_num
        batch.extend_prefix_lens = forward_batch.seq_lens
        batch.extend_seq_lens = torch.full_like(forward_batch.seq_lens, width)
        batch.seq_lens = forward_batch.seq_lens + width
    return original(backend, q, k, v, layer, batch, *args, **kwargs)
