"""Which inner backend stands behind each `--attention-backend` name, and what it can do."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional

import torch

from sglang_dcp.config import dcp_of
from sglang_dcp.layers.adaptors.base import DcpAdaptor

_HERE = "sglang_dcp.layers.adaptors"
_HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class AdaptorSpec:
    """What an adaptor's kernels were made, and checked, for.

    Attributes
    ----------
    adaptor : str
        `module:class`, by name: modules of GPU backends import only where they can run.
    cpu, mla : bool
        Serves on a CPU; serves latent attention.
    dtypes : tuple of torch.dtype
        Of the model; empty for any.
    head_dims : tuple of int
        Empty for any.
    fp8_kv : bool
        Reads a float8_e4m3fn cache.
    """

    adaptor: str
    cpu: bool = False
    mla: bool = False
    dtypes: tuple[torch.dtype, ...] = _HALF
    head_dims: tuple[int, ...] = ()
    fp8_kv: bool = True


# Best first.
ADAPTORS: dict[str, AdaptorSpec] = {
    "fa3": AdaptorSpec(f"{_HERE}.fa3:Fa3Adaptor", head_dims=(64, 96, 128, 192, 256)),
    "flashinfer": AdaptorSpec(
        f"{_HERE}.flashinfer:FlashInferAdaptor", head_dims=(64, 128, 256)
    ),
    "triton": AdaptorSpec(f"{_HERE}.triton:TritonAdaptor"),
    "torch_native": AdaptorSpec(
        f"{_HERE}.torch_native:TorchNativeAdaptor",
        cpu=True,
        mla=True,
        dtypes=(),
        fp8_kv=False,
    ),
}


class Need(NamedTuple):
    """What a server asks of its attention backend; None: not known yet."""

    device: Optional[str]
    mla: bool = False
    dtype: Optional[torch.dtype] = None
    head_dim: Optional[int] = None
    kv_dtype: Optional[torch.dtype] = None


class Unmet(NamedTuple):
    """A need that an adaptor does not meet: the flag that asks, its value, the reason."""

    flag: str
    value: str
    reason: str


def unmet(name: str, need: Need) -> Optional[Unmet]:
    """Why backend `name` cannot serve `need`, or None where it can."""
    spec = ADAPTORS.get(name)
    where = "latent attention" if need.mla else f"device {need.device}"
    if (
        spec is None
        or (need.device == "cpu" and not spec.cpu)
        or (need.mla and not spec.mla)
    ):
        reason = f"this version has no adaptor for it on {where}"
        return Unmet("--attention-backend", name, reason)
    if need.dtype is not None and spec.dtypes and need.dtype not in spec.dtypes:
        reason = f"attention backend {name} was made and checked for 16-bit types"
        return Unmet("--dtype", _shown(need.dtype), reason)
    if need.head_dim is not None and spec.head_dims:
        if need.head_dim not in spec.head_dims:
            reason = f"attention backend {name} has no kernel for heads of this size"
            return Unmet("--model-path", f"head_dim {need.head_dim}", reason)
    if need.kv_dtype not in (None, need.dtype):
        if need.kv_dtype != FP8 or not spec.fp8_kv:
            reason = f"attention backend {name} was not made or checked for it"
            return Unmet("--kv-cache-dtype", _shown(need.kv_dtype), reason)
    return None


def adaptor_names(need: Need) -> list[str]:
    """Attention backends that can serve, best first."""
    return [name for name in ADAPTORS if unmet(name, need) is None]


def adaptor_class(name: str) -> type[DcpAdaptor]:
    """The adaptor of an attention backend."""
    return pkgutil.resolve_name(ADAPTORS[name].adaptor)


def create_backend(name: str, original: Callable[[Any], Any], runner: Any) -> Any:
    """Seam: a registry entry; `original` where DCP is off."""
    if dcp_of(runner.server_args) is None:
        return original(runner)
    from sglang_dcp.layers.attention import DcpAttentionBackend

    return DcpAttentionBackend.for_runner(adaptor_class(name), runner)


def _shown(dtype: Optional[torch.dtype]) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(name: str, original: str) -> Callable[[Any], Any]:
    def create(runner: Any) -> Any:
        from sglang.srt.layers.attention import attention_registry

        return create_backend(name, getattr(attention_registry, original), runner)

    return create


create_torch_native_backend = _entry("torch_native", "create_torch_native_backend")
create_triton_backend = _entry("triton", "create_triton_backend")
create_flashinfer_backend = _entry("flashinfer", "create_flashinfer_backend")
create_flashattention_v3_backend = _entry("fa3", "create_flashattention_v3_backend")
