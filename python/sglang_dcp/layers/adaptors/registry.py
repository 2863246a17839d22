"""Which inner backend stands behind each `--attention-backend` name, and what it can do."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional, Union

import torch

from sglang_dcp.config import dcp_of
from sglang_dcp.layers.adaptors.base import DcpAdaptor

_HERE = "sglang_dcp.layers.adaptors"
_HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


# Heads are of one size, or, absorbed MLA, of a latent and a rotary part.
HeadDim = Union[int, tuple[int, int]]


@dataclass(frozen=True)
class Kernels:
    """What an adaptor's kernels were made, and checked, for.

    Attributes
    ----------
    adaptor : str
        `module:class`, by name: modules of GPU backends import only where they can run.
    cpu : bool
        Serves on a CPU.
    dtypes : tuple of torch.dtype
        Of the model; empty for any.
    head_dims : tuple of HeadDim
        Empty for any.
    fp8_with : tuple of torch.dtype
        Models whose float8_e4m3fn cache it reads.
    no_fp8 : str
        Why it reads no other.
    own_heads_divide : int
        What a rank's own query heads must divide; 0 for any.
    """

    adaptor: str
    cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = _HALF
    head_dims: tuple[HeadDim, ...] = ()
    fp8_with: tuple[torch.dtype, ...] = _HALF
    no_fp8: str = "was not made or checked for it"
    own_heads_divide: int = 0


_TORCH_NATIVE = Kernels(
    f"{_HERE}.torch_native:TorchNativeAdaptor", cpu=True, dtypes=(), fp8_with=()
)

# Best first.
GQA_ADAPTORS: dict[str, Kernels] = {
    "fa3": Kernels(f"{_HERE}.fa3:Fa3Adaptor", head_dims=(64, 96, 128, 192, 256)),
    "flashinfer": Kernels(
        f"{_HERE}.flashinfer:FlashInferAdaptor", head_dims=(64, 128, 256)
    ),
    "triton": Kernels(f"{_HERE}.triton:TritonAdaptor"),
    "torch_native": _TORCH_NATIVE,
}
MLA_ADAPTORS: dict[str, Kernels] = {
    "fa3": Kernels(
        f"{_HERE}.fa3_mla:Fa3MlaAdaptor",
        head_dims=((512, 64),),
        fp8_with=(),
        no_fp8="has no kernel for fp8 latents, and casting would copy the whole pool in "
        "every layer",
    ),
    "flashinfer": Kernels(
        f"{_HERE}.flashinfer_mla:FlashInferMlaAdaptor",
        head_dims=((512, 64),),
        fp8_with=(torch.bfloat16,),
        no_fp8="has kernels for fp8 latents of bfloat16 models alone",
        # Where a tile of 128 rows ends amid a token, its causal bound is rounded down.
        own_heads_divide=128,
    ),
    "torch_native": _TORCH_NATIVE,
}

# Why backends that one might expect have none.
_WITHOUT_ADAPTOR = {
    "flashmla": "its decode kernel was not tried on shards without a key",
}


class Need(NamedTuple):
    """What a server asks of its attention backend; None: not known yet."""

    device: Optional[str]
    mla: bool = False
    dtype: Optional[torch.dtype] = None
    head_dim: Optional[HeadDim] = None
    kv_dtype: Optional[torch.dtype] = None
    own_heads: Optional[int] = None


class Unmet(NamedTuple):
    """A need that an adaptor does not meet: the flag that asks, its value, the reason."""

    flag: str
    value: str
    reason: str


def adaptors(mla: bool) -> dict[str, Kernels]:
    """By name of the attention backend, best first."""
    return MLA_ADAPTORS if mla else GQA_ADAPTORS


def unmet(name: str, need: Need) -> Optional[Unmet]:
    """Why backend `name` cannot serve `need`, or None where it can."""
    kernels = adaptors(need.mla).get(name)
    if kernels is None or (need.device == "cpu" and not kernels.cpu):
        where = f"device {need.device}" + " with latent attention" * need.mla
        known = _WITHOUT_ADAPTOR.get(name)
        reason = known or f"this version has no adaptor for it on {where}"
        return Unmet("--attention-backend", name, reason)
    if need.own_heads and kernels.own_heads_divide % need.own_heads:
        reason = (
            f"its kernel needs query heads a rank (heads / tp) that divide "
            f"{kernels.own_heads_divide}, not {need.own_heads}"
        )
        return Unmet("--attention-backend", name, reason)
    if need.dtype is not None and kernels.dtypes and need.dtype not in kernels.dtypes:
        reason = f"attention backend {name} was made and checked for 16-bit types"
        return Unmet("--dtype", _shown(need.dtype), reason)
    if need.head_dim is not None and kernels.head_dims:
        if need.head_dim not in kernels.head_dims:
            reason = f"attention backend {name} has no kernel for heads of this size"
            return Unmet("--model-path", _shown_dim(need.head_dim), reason)
    if need.kv_dtype not in (None, need.dtype) and not _reads_fp8(kernels, need):
        # Other formats than fp8 no adaptor was made for.
        why = kernels.no_fp8 if need.kv_dtype == FP8 else Kernels.no_fp8
        reason = f"attention backend {name} {why}"
        return Unmet("--kv-cache-dtype", _shown(need.kv_dtype), reason)
    return None


def _reads_fp8(kernels: Kernels, need: Need) -> bool:
    known = kernels.fp8_with if need.dtype is None else (need.dtype,)
    return need.kv_dtype == FP8 and any(dtype in kernels.fp8_with for dtype in known)


def _shown_dim(dim: HeadDim) -> str:
    if isinstance(dim, int):
        return f"head_dim {dim}"
    return f"kv_lora_rank {dim[0]}, qk_rope_head_dim {dim[1]}"


def adaptor_names(need: Need) -> list[str]:
    """Attention backends that can serve, best first."""
    return [name for name in adaptors(need.mla) if unmet(name, need) is None]


def adaptor_class(name: str, mla: bool) -> type[DcpAdaptor]:
    """The adaptor of an attention backend."""
    return pkgutil.resolve_name(adaptors(mla)[name].adaptor)


def create_backend(name: str, original: Callable[[Any], Any], runner: Any) -> Any:
    """Seam: a registry entry; `original` where DCP is off."""
    if dcp_of(runner.server_args) is None:
        return original(runner)
    from sglang_dcp.layers.attention import DcpAttentionBackend

    adaptor = adaptor_class(name, runner.use_mla_backend)
    return DcpAttentionBackend.for_runner(adaptor, runner)


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
