"""Which inner backend stands behind each `--attention-backend` name."""

from __future__ import annotations

import pkgutil
from typing import Any, Callable, Optional

from sglang_dcp.config import dcp_of
from sglang_dcp.layers.adaptors.base import DcpAdaptor

_HERE = "sglang_dcp.layers.adaptors"

# By name: modules of GPU backends import only where they can run.
ADAPTORS: dict[str, str] = {
    "torch_native": f"{_HERE}.torch_native:TorchNativeAdaptor",
    "triton": f"{_HERE}.triton:TritonAdaptor",
    "fa3": f"{_HERE}.fa3:Fa3Adaptor",
}
# Latent attention: qk and v of different width over one shared K/V head.
_MLA = ("torch_native",)
_CPU = ("torch_native",)
HALF_ONLY = ("fa3", "triton")


def adaptor_names(*, device: Optional[str], mla: bool) -> list[str]:
    """Attention backends that can serve, best first; `device` None: not known yet."""
    names = ["fa3", "triton", "torch_native"]
    if device == "cpu":
        names = [name for name in names if name in _CPU]
    return [name for name in names if name in _MLA] if mla else names


def adaptor_class(name: str) -> type[DcpAdaptor]:
    """The adaptor of an attention backend."""
    return pkgutil.resolve_name(ADAPTORS[name])


def create_backend(name: str, original: Callable[[Any], Any], runner: Any) -> Any:
    """Seam: a registry entry; `original` where DCP is off."""
    if dcp_of(runner.server_args) is None:
        return original(runner)
    from sglang_dcp.layers.attention import DcpAttentionBackend

    return DcpAttentionBackend.for_runner(adaptor_class(name), runner)


def _entry(name: str, original: str) -> Callable[[Any], Any]:
    def create(runner: Any) -> Any:
        from sglang.srt.layers.attention import attention_registry

        return create_backend(name, getattr(attention_registry, original), runner)

    return create


create_torch_native_backend = _entry("torch_native", "create_torch_native_backend")
create_triton_backend = _entry("triton", "create_triton_backend")
create_flashattention_v3_backend = _entry("fa3", "create_flashattention_v3_backend")
