"""What an attention backend can do, what a server requires, and the first mismatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

import torch

HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn

# One head dim, or for absorbed MLA the sizes of the latent and of the rotary part.
HeadDim = Union[int, tuple[int, int]]


@dataclass(frozen=True)
class BackendCapabilities:
    """What a backend's kernels were made and checked for.

    Attributes
    ----------
    cpu : bool
        Whether it serves on a CPU.
    dtypes : tuple of torch.dtype
        Dtypes of the model; empty for any.
    head_dims : tuple of HeadDim
        Head dims; empty for any.
    fp8_with : tuple of torch.dtype
        Dtypes of models whose float8_e4m3fn cache it reads.
    no_fp8 : str
        Why it reads no other float8_e4m3fn cache.
    local_heads_divide : int
        A rank's local query heads must divide this number; 0 allows any.
    """

    cpu: bool = False
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: tuple[HeadDim, ...] = ()
    fp8_with: tuple[torch.dtype, ...] = HALF
    no_fp8: str = "was not made or checked for it"
    local_heads_divide: int = 0


class Requirement(NamedTuple):
    """What a server requires of its attention backend. None means not known yet."""

    device: Optional[str]
    mla: bool = False
    dtype: Optional[torch.dtype] = None
    head_dim: Optional[HeadDim] = None
    kv_dtype: Optional[torch.dtype] = None
    local_heads: Optional[int] = None


class Mismatch(NamedTuple):
    """A requirement that a backend does not meet: the flag, its value and the reason."""

    flag: str
    value: str
    reason: str


def compare(
    name: str, capabilities: BackendCapabilities, requirement: Requirement
) -> Optional[Mismatch]:
    """Return the first requirement that backend `name` does not meet, or None.

    The device is not compared. The registry knows which backends exist on it.
    """
    checks = (_local_heads, _dtype, _head_dim, _kv_dtype)
    found = (check(name, capabilities, requirement) for check in checks)
    return next((mismatch for mismatch in found if mismatch is not None), None)


def _local_heads(
    name: str, can: BackendCapabilities, need: Requirement
) -> Optional[Mismatch]:
    if not need.local_heads or can.local_heads_divide % need.local_heads == 0:
        return None
    reason = (
        f"its kernel needs query heads per rank (heads / tp) that divide "
        f"{can.local_heads_divide}, not {need.local_heads}"
    )
    return Mismatch("--attention-backend", name, reason)


def _dtype(
    name: str, can: BackendCapabilities, need: Requirement
) -> Optional[Mismatch]:
    if need.dtype is None or not can.dtypes or need.dtype in can.dtypes:
        return None
    reason = f"attention backend {name} was made and checked for 16-bit types"
    return Mismatch("--dtype", _shown(need.dtype), reason)


def _head_dim(
    name: str, can: BackendCapabilities, need: Requirement
) -> Optional[Mismatch]:
    if need.head_dim is None or not can.head_dims or need.head_dim in can.head_dims:
        return None
    reason = f"attention backend {name} has no kernel for heads of this size"
    return Mismatch("--model-path", _shown_dim(need.head_dim), reason)


def _kv_dtype(
    name: str, can: BackendCapabilities, need: Requirement
) -> Optional[Mismatch]:
    if need.kv_dtype in (None, need.dtype) or _reads_fp8(can, need):
        return None
    # No backend reads other quantized formats than fp8.
    why = can.no_fp8 if need.kv_dtype == FP8 else BackendCapabilities.no_fp8
    reason = f"attention backend {name} {why}"
    return Mismatch("--kv-cache-dtype", _shown(need.kv_dtype), reason)


def _reads_fp8(can: BackendCapabilities, need: Requirement) -> bool:
    known = can.fp8_with if need.dtype is None else (need.dtype,)
    return need.kv_dtype == FP8 and any(dtype in can.fp8_with for dtype in known)


def _shown_dim(dim: HeadDim) -> str:
    if isinstance(dim, int):
        return f"head_dim {dim}"
    return f"kv_lora_rank {dim[0]}, qk_rope_head_dim {dim[1]}"


def _shown(dtype: Optional[torch.dtype]) -> str:
    return str(dtype).removeprefix("torch.")
