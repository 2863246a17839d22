"""Merge partial attention outputs by their log-sum-exp (LSE).

Shard n holds ``out_n = softmax(s_n) v_n`` and ``lse_n = log(sum(exp(s_n)))`` over its
keys. The merge is ``lse = log(sum_n exp(lse_n))``, ``out = sum_n exp(lse_n - lse) out_n``.
An LSE of -inf, +inf or NaN marks an empty shard. Its weight is exactly 0, and its output
is never used, even if it is NaN. If all shards of a row are empty, the output is 0 and
the LSE is -inf.

For every function:

- Payloads are fp16, bf16 or fp32. The LSE is fp32. Strides are free unless stated.
- ``is_lse_base_on_e`` is True for natural log and False for base 2. The merged LSE keeps
  the base.
- Triton kernels run on CUDA, ``lse_merge_torch`` runs on CPU. Both sum in rank order, in
  float32.
- Safe in CUDA-graph capture.
- ValueError for shapes or devices that do not match, TypeError for other dtypes,
  NotImplementedError for other devices.

Source: online softmax, arXiv 1805.02867; exchange of partial outputs, arXiv 2507.07120.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sglang_dcp.ops import lse_merge_torch

PARTIAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def lse_weighted_combine(
    outs: Tensor,
    lses: Tensor,
    *,
    is_lse_base_on_e: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merge the partial outputs of N shards.

    Public API, under vLLM's name. It is for engines and tests that gather partial
    outputs themselves. The exchanges of this package merge with `partials`.

    Parameters
    ----------
    outs : [N, tokens, heads, head_dim], in rank order
    lses : [N, tokens, heads], of ``outs``

    Returns
    -------
    out : [tokens, heads, head_dim] in ``outs.dtype``; at N == 1 the view ``outs[0]``
    lse : [tokens, heads], only with ``return_lse``
    """
    check_states(outs, lses, 4, "outs", "lses")
    if outs.shape[0] == 1:
        return (outs[0], lses[0]) if return_lse else outs[0]
    if kernels := _kernels_for(outs, lses):
        out, lse = empty_state(outs.shape[1:], outs)
        kernels.combine(outs, lses, out, lse, is_lse_base_on_e)
    else:
        out, lse = lse_merge_torch.lse_weighted_combine_torch(
            outs, lses, is_lse_base_on_e=is_lse_base_on_e
        )
        out = out.to(outs.dtype)
    return (out, lse) if return_lse else out


def correct_attn_out(
    out: Tensor,
    lses: Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
    corrected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale one rank's partial output so that the sum over ranks is the merged output.

    Public API, under SGLang's name. It is for exchanges that reduce-scatter scaled
    outputs. The exchanges of this package do not call it.

    Parameters
    ----------
    out : [tokens, heads, head_dim] or [tokens, 1, heads, head_dim]
    lses : [N, tokens, heads] in rank order; one more dimension of size 1 is accepted
    rank : the rank that computed ``out``
    corrected : [tokens, heads, head_dim], any strides; None allocates it in fp32

    Returns
    -------
    corrected : [tokens, heads, head_dim]; at N == 1 the object ``out``, untouched
    lse : [tokens, heads], merged
    """
    if lses.shape[0] == 1:
        return out, lses[0]
    out, lses = _squeeze_views(out, lses)
    check_states(out, lses[0], 3, "out", "lses[rank]")
    check_rank(rank, lses.shape[0])
    if corrected is None:
        corrected = out.new_empty(out.shape, dtype=torch.float32)
    _check_same_shape(corrected, out, "corrected and out")
    if kernels := _kernels_for(out, lses, corrected):
        lse = lses.new_empty(lses.shape[1:])
        kernels.correct(out, lses, rank, corrected, lse, is_lse_base_on_e)
    else:
        scaled, lse = lse_merge_torch.correct_attn_out_torch(
            out, lses, rank, is_lse_base_on_e=is_lse_base_on_e
        )
        corrected.copy_(scaled)
    return corrected, lse


def merge_two_states(
    o_a: Tensor,
    lse_a: Tensor,
    o_b: Tensor,
    lse_b: Tensor,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merge two attention states, for example those of new tokens and cached prefix.

    Parameters
    ----------
    o_a, o_b : [tokens, heads, head_dim], same dtype
    lse_a, lse_b : [tokens, heads], same log base

    Returns
    -------
    out : [tokens, heads, head_dim] in ``o_a.dtype``
    lse : [tokens, heads]
    """
    check_states(o_a, lse_a, 3, "o_a", "lse_a")
    check_states(o_b, lse_b, 3, "o_b", "lse_b")
    _check_same_shape(o_a, o_b, "o_a and o_b")
    if o_a.dtype != o_b.dtype:
        raise TypeError(f"o_a is {o_a.dtype}, o_b is {o_b.dtype}; one dtype is needed")
    if kernels := _kernels_for(o_a, lse_a, o_b, lse_b):
        out, lse = empty_state(o_a.shape, o_a)
        kernels.merge_two(o_a, lse_a, o_b, lse_b, out, lse, is_lse_base_on_e)
        return out, lse
    out, lse = lse_merge_torch.merge_two_states_torch(
        o_a, lse_a, o_b, lse_b, is_lse_base_on_e=is_lse_base_on_e
    )
    return out.to(o_a.dtype), lse


def uses_kernels(*tensors: Tensor) -> bool:
    """Return True for CUDA tensors and False for CPU tensors.

    Raises ValueError for tensors on different devices, NotImplementedError for other
    devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors are on different devices: {devices}")
    device = devices.pop()
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"LSE merge has no kernel for {device}: cuda or cpu")
    return device.type == "cuda"


def _kernels_for(*tensors: Tensor) -> ModuleType | None:
    if not uses_kernels(*tensors):
        return None
    # Not at module level: CPU users may have no Triton.
    from sglang_dcp.ops import lse_merge_triton

    return lse_merge_triton


def empty_state(shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate an output of ``shape`` in the dtype of ``like``, and its fp32 LSE."""
    return like.new_empty(shape), like.new_empty(shape[:-1], dtype=torch.float32)


def _check_same_shape(a: Tensor, b: Tensor, names: str) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{names} differ: {tuple(a.shape)} and {tuple(b.shape)}")


def check_rank(rank: int, world_size: int) -> None:
    """Raise ValueError unless ``rank`` is one of 0 to ``world_size - 1``."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1}")


def check_states(out: Tensor, lse: Tensor, dims: int, *names: str) -> None:
    """Raise unless ``out`` has ``dims`` dimensions and ``lse`` is its LSE.

    ``names`` are those of the two arguments, for the message. Raises ValueError for
    shapes, TypeError for dtypes.
    """
    if out.dim() != dims or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"{names[0]} must have {dims} dimensions and {names[1]} the same without the "
            f"last: got {tuple(out.shape)} and {tuple(lse.shape)}"
        )
    if out.dtype not in PARTIAL_DTYPES or lse.dtype != torch.float32:
        raise TypeError(
            f"{names[0]} must be float16, bfloat16 or float32 and {names[1]} float32: "
            f"got {out.dtype} and {lse.dtype}"
        )


def _squeeze_views(out: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    if out.dim() == 4 and out.shape[1] == 1:
        out = out.squeeze(1)
    squeezed = [lses.squeeze(dim) for dim in range(1, lses.dim())]
    matching = (view for view in squeezed if view.shape[1:] == out.shape[:-1])
    return out, next(matching, lses)
