"""The steps of an exchange of partial outputs before and after the communication.

N ranks hold partial outputs of all heads. Rank p ends with the heads
[p * heads / N, (p + 1) * heads / N). Each rank sends every peer that peer's heads. It
merges what it receives with its local partial output, which it reads where the attention
kernel left it. Peer j is the j-th rank of the group when this rank is left out.

Dtypes, empty shards, log bases, kernels and errors are those of ``lse_merge``. All
shards, this rank's included, are summed in rank order, in float32. Safe in CUDA-graph
capture.

Source: exchange of partial outputs, arXiv 2507.07120.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sglang_dcp.ops import partials_torch
from sglang_dcp.ops.lse_merge import (
    check_rank,
    check_states,
    empty_state,
    uses_kernels,
)


def pack_partials(out: Tensor, lse: Tensor, world_size: int, rank: int) -> Tensor:
    """Slice partial output and LSE by peer, into rows that carry both.

    A row is head_dim values, padding, and the LSE bit for bit in the last 4 bytes. Its
    size is a multiple of 16 bytes. The content of the padding is undefined.

    Parameters
    ----------
    out : [tokens, heads, head_dim]
    lse : [tokens, heads], any log base
    world_size : N; it must divide the heads
    rank : this rank's index in the group

    Returns
    -------
    packed : [N - 1, tokens, heads / N, width] in ``out.dtype``, contiguous; slice j is
        for peer j
    """
    check_states(out, lse, 3, "out", "lse")
    shape = _cut_shape(out, world_size, rank)
    if kernels := _kernels_for(out, lse):
        packed = out.new_empty(
            *shape, partials_torch.packed_width(out.shape[-1], out.dtype)
        )
        kernels.cut(out, lse, rank, packed)
        return packed
    return partials_torch.pack_partials_torch(out, lse, world_size, rank)


def slice_for_peers(out: Tensor, world_size: int, rank: int) -> Tensor:
    """Slice a partial output by peer, without its LSE.

    Parameters
    ----------
    out : [tokens, heads, head_dim], any dtype
    world_size : N; it must divide the heads
    rank : this rank's index in the group

    Returns
    -------
    cut : [N - 1, tokens, heads / N, head_dim] in ``out.dtype``, contiguous; slice j is
        for peer j
    """
    shape = _cut_shape(out, world_size, rank)
    if kernels := _kernels_for(out):
        cut = out.new_empty(*shape, out.shape[-1])
        kernels.cut(out, None, rank, cut)
        return cut
    return partials_torch.slice_for_peers_torch(out, world_size, rank)


def unpack_combine(
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merge this rank's partial output with the rows that its peers packed.

    Parameters
    ----------
    packed : [N - 1, tokens, heads, width], contiguous; slice j is from peer j
    out : [tokens, heads, head_dim], this rank's partial output of its local heads
    lse : [tokens, heads], of ``out``
    rank : this rank's index in the group

    Returns
    -------
    out : [tokens, heads, head_dim] in ``packed.dtype``, contiguous
    lse : [tokens, heads], merged
    """
    width = partials_torch.packed_width(out.shape[-1], out.dtype)
    _check_received(packed, out, width)
    _, lses = partials_torch.split_packed(packed, out.shape[-1])
    return _combine(packed, lses, out, lse, rank, is_lse_base_on_e)


def combine_from_peers(
    cut: Tensor,
    lses: Tensor,
    out: Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merge this rank's partial output with the slices that its peers made.

    Parameters
    ----------
    cut : [N - 1, tokens, heads, head_dim], contiguous; slice j is from peer j
    lses : [N, tokens, heads] of the same heads, in rank order, this rank's included
    out : [tokens, heads, head_dim], this rank's partial output of its local heads
    rank : this rank's index in the group

    Returns
    -------
    out : [tokens, heads, head_dim] in ``cut.dtype``, contiguous
    lse : [tokens, heads], merged
    """
    _check_received(cut, out, out.shape[-1])
    if lses.shape != (cut.shape[0] + 1, *out.shape[:-1]):
        raise ValueError(
            f"lses must be [N, tokens, heads] of {cut.shape[0] + 1} ranks for out "
            f"{tuple(out.shape)}: got {tuple(lses.shape)}"
        )
    check_rank(rank, lses.shape[0])
    return _combine(cut, lses, out, lses[rank], rank, is_lse_base_on_e)


def interleave_heads(gathered: Tensor) -> Tensor:
    """Reorder heads that were gathered rank after rank, so that each token has all.

    Parameters
    ----------
    gathered : [N, tokens, heads, head_dim], contiguous, any dtype

    Returns
    -------
    [tokens, N * heads, head_dim], contiguous; for one token a view of ``gathered``
    """
    world_size, tokens, heads, head_dim = gathered.shape
    shape = (tokens, world_size * heads, head_dim)
    if tokens == 1:
        return gathered.view(shape)
    if kernels := _kernels_for(gathered):
        out = gathered.new_empty(shape)
        kernels.interleave(gathered, out)
        return out
    return partials_torch.interleave_heads_torch(gathered)


def _combine(
    rows: Tensor, lses: Tensor, own: Tensor, own_lse: Tensor, rank: int, base_e: bool
) -> tuple[Tensor, Tensor]:
    check_states(own, own_lse, 3, "out", "lse")
    check_rank(rank, rows.shape[0] + 1)
    if kernels := _kernels_for(rows, lses, own, own_lse):
        merged, merged_lse = empty_state(own.shape, own)
        kernels.combine(rows, lses, own, own_lse, rank, merged, merged_lse, base_e)
        return merged, merged_lse
    outs = rows[..., : own.shape[-1]]
    merged, merged_lse = partials_torch.combine_with_peers_torch(
        outs, lses, own, own_lse, rank, is_lse_base_on_e=base_e
    )
    return merged.to(own.dtype), merged_lse


def _kernels_for(*tensors: Tensor) -> ModuleType | None:
    if not uses_kernels(*tensors):
        return None
    # Not at module level: CPU users may have no Triton.
    from sglang_dcp.ops import partials_triton

    return partials_triton


def _cut_shape(out: Tensor, world_size: int, rank: int) -> tuple[int, int, int]:
    tokens, heads, _ = out.shape
    if heads % world_size:
        raise ValueError(f"{heads} heads do not divide by world size {world_size}")
    check_rank(rank, world_size)
    return world_size - 1, tokens, heads // world_size


def _check_received(received: Tensor, out: Tensor, width: int) -> None:
    shape = (*received.shape[:1], *out.shape[:2], width)
    fits = received.shape == shape and received.dtype == out.dtype
    if not fits or not received.is_contiguous():
        raise ValueError(
            f"rows from peers must be contiguous [N - 1, {', '.join(map(str, shape[1:]))}]"
            f" in {out.dtype} for out {tuple(out.shape)}, got {tuple(received.shape)} in "
            f"{received.dtype}"
        )
