"""Hooks of SGLang's attention registry, which build a `DcpAttentionBackend`."""

from __future__ import annotations

from typing import Any, Callable

from sglang_dcp.config import dcp_of


def create_backend(name: str, original: Callable[[Any], Any], runner: Any) -> Any:
    """Build the backend of registry entry `name`; `original(runner)` with DCP off."""
    if dcp_of(runner.server_args) is None:
        return original(runner)
    from sglang_dcp.layers.attention import DcpAttentionBackend
    from sglang_dcp.layers.backends.registry import backend_class

    inner = backend_class(name, runner.use_mla_backend)
    return DcpAttentionBackend.for_runner(inner, runner)


def _entry(name: str, original: str) -> Callable[[Any], Any]:
    def create(runner: Any) -> Any:
        from sglang.srt.layers.attention import attention_registry

        return create_backend(name, getattr(attention_registry, original), runner)

    return create


create_torch_native_backend = _entry("torch_native", "create_torch_native_backend")
create_triton_backend = _entry("triton", "create_triton_backend")
create_flashinfer_backend = _entry("flashinfer", "create_flashinfer_backend")
create_flashattention_v3_backend = _entry("fa3", "create_flashattention_v3_backend")
