"""What an exchange of partial outputs does before and after it communicates.

N ranks hold partial outputs of all heads; rank p of N ends with heads
[p * heads / N, (p + 1) * heads / N). A rank sends each peer that peer's heads and merges
what it gets with its own partial, which it reads where the attention kernel left it.
Peer j is the j-th rank without this one.

Dtypes, empty shards, log bases, kernels, errors: as in ``merge``. Shards are summed in
rank order, the own one in its place, in float32. Safe in CUDA-graph capture.

Source: exchange of partial outputs, arXiv 2507.07120.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from sglang_dcp.layers import merge_ref
from sglang_dcp.layers.merge import (
    Merged,
    check_rank,
    check_states,
    empty_state,
    uses_kernels,
)


def pack_partials(out: Tensor, lse: Tensor, world_size: int, rank: int) -> Tensor:
    """Cut partial output and LSE into rows that carry both.

    A row is head_dim values, padding up to a multiple of 16 bytes (its content is
    undefined), and in the last 4 bytes the LSE, bit for bit.

    Parameters
    ----------
    out : [tokens, heads, head_dim]
    lse : [tokens, heads], any log base
    world_size : N, divides heads
    rank : this rank

    Returns
    -------
    packed : [N - 1, tokens, heads / N, width] in ``out.dtype``, contiguous; slice j is
        for peer j
    """
    check_states(out, lse, 3, "out", "lse")
    shape = _cut_shape(out, world_size, rank)
    if kernels := _kernels_for(out, lse):
        packed = out.new_empty(*shape, merge_ref.packed_width(out.shape[-1], out.dtype))
        kernels.cut(out, lse, rank, packed)
        return packed
    return merge_ref.pack_partials_ref(out, lse, world_size, rank)


def cut_partials(out: Tensor, world_size: int, rank: int) -> Tensor:
    """Cut a partial output alone.

    Parameters
    ----------
    out : [tokens, heads, head_dim], any dtype
    world_size : N, divides heads
    rank : this rank

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
    return merge_ref.cut_partials_ref(out, world_size, rank)


def unpack_combine(
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
    return_lse: bool = False,
) -> Merged:
    """Merge a rank's own partial with what its peers' ``pack_partials`` delivered.

    Parameters
    ----------
    packed : [N - 1, tokens, heads, width], contiguous, slice j from peer j
    out : [tokens, heads, head_dim], this rank's own partial of the same heads
    lse : [tokens, heads], of ``out``
    rank : this rank

    Returns
    -------
    out : [tokens, heads, head_dim] in ``packed.dtype``, contiguous
    lse : [tokens, heads], only with ``return_lse``
    """
    width = merge_ref.packed_width(out.shape[-1], out.dtype)
    _check_received(packed, out, width)
    _, lses = merge_ref.split_packed(packed, out.shape[-1])
    merged = _combine(packed, lses, out, lse, rank, is_lse_base_on_e)
    return merged if return_lse else merged[0]


def cut_combine(
    cut: Tensor,
    lses: Tensor,
    out: Tensor,
    rank: int,
    *,
    is_lse_base_on_e: bool = True,
    return_lse: bool = False,
) -> Merged:
    """Merge a rank's own partial with what its peers' ``cut_partials`` delivered.

    Parameters
    ----------
    cut : [N - 1, tokens, heads, head_dim], contiguous, slice j from peer j
    lses : [N, tokens, heads] of the same heads, in rank order, the own among them
    out : [tokens, heads, head_dim], this rank's own partial
    rank : this rank

    Returns
    -------
    out : [tokens, heads, head_dim] in ``cut.dtype``, contiguous
    lse : [tokens, heads], only with ``return_lse``
    """
    _check_received(cut, out, out.shape[-1])
    if lses.shape != (cut.shape[0] + 1, *out.shape[:-1]):
        raise ValueError(
            f"lses must be [N, tokens, heads] of {cut.shape[0] + 1} ranks for out "
            f"{tuple(out.shape)}: got {tuple(lses.shape)}"
        )
    check_rank(rank, lses.shape[0])
    merged = _combine(cut, lses, out, lses[rank], rank, is_lse_base_on_e)
    return merged if return_lse else merged[0]


def interleave_heads(gathered: Tensor) -> Tensor:
    """Bring heads that were gathered by rank together for each token.

    Parameters
    ----------
    gathered : [N, tokens, heads, head_dim], contiguous, any dtype

    Returns
    -------
    [tokens, N * heads, head_dim], contiguous; of one token a view of ``gathered``
    """
    world_size, tokens, heads, head_dim = gathered.shape
    shape = (tokens, world_size * heads, head_dim)
    if tokens == 1:
        return gathered.view(shape)
    if kernels := _kernels_for(gathered):
        out = gathered.new_empty(shape)
        kernels.interleave(gathered, out)
        return out
    return merge_ref.interleave_heads_ref(gathered)


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
    merged, merged_lse = merge_ref.combine_with_peers_ref(
        outs, lses, own, own_lse, rank, is_lse_base_on_e=base_e
    )
    return merged.to(own.dtype), merged_lse


def _kernels_for(*tensors: Tensor) -> ModuleType | None:
    if not uses_kernels(*tensors):
        return None
    # Not at module level: CPU users may have no Triton.
    from sglang_dcp.layers import merge_peers_triton

    return merge_peers_triton


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
            f"what peers sent must be contiguous [N - 1, {', '.join(map(str, shape[1:]))}]"
            f" in {out.dtype} for out {tuple(out.shape)}, got {tuple(received.shape)} in "
            f"{received.dtype}"
        )
