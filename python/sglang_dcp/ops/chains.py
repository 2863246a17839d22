"""Attention of a chain's query tokens to themselves, merged with what they saw before.

In a verification each request has `width` query tokens, and token j follows token j - 1.
All of them see the same committed tokens, which were attended to already: as a prefix that
is sharded over ranks, and merged. What is left are the keys of the query tokens themselves,
at most `width` for each of them. One launch attends to these and merges both.

Source: online softmax, arXiv 1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from torch import Tensor

from sglang_dcp.ops import chains_torch
from sglang_dcp.ops.lse_merge import check_states, uses_kernels


class Chains(NamedTuple):
    """The query tokens of a verification, request after request. Strides are free.

    Attributes
    ----------
    q : Tensor [tokens, heads, qk]
        Queries of the rank's own heads.
    k, v : Tensor [tokens, kv heads, qk] and [tokens, kv heads, v]
        In one dtype with `q`.
    q_rope, k_rope : Tensor [tokens, heads, rope] and [tokens, kv heads, rope], optional
        More dimensions of queries and keys: the rotary part of latent attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rope: Optional[Tensor] = None
    k_rope: Optional[Tensor] = None


class ChainSizes(NamedTuple):
    """What attention of chains is besides its tensors.

    Attributes
    ----------
    width : int
        Query tokens of each request.
    scaling : float
        Factor of a score.
    first_head, heads_of_kv : int
        The rank's first head among those of its DCP group, and how many of these each K/V
        head serves.
    is_lse_base_on_e : bool
        True if the LSE of the prefix is in natural log, False for base 2.
    """

    width: int
    scaling: float
    first_head: int
    heads_of_kv: int
    is_lse_base_on_e: bool


def attend_chains(
    chains: Chains, prefix: Tensor, prefix_lse: Tensor, sizes: ChainSizes
) -> Tensor:
    """Attend with each query token to those of its request up to itself, and to its prefix.

    Head h reads K/V head ``(first_head + h) // heads_of_kv``. Triton kernels run on CUDA,
    torch runs on CPU. Safe in CUDA-graph capture.

    Parameters
    ----------
    chains : Chains
    prefix : Tensor [tokens, heads, v]
        Merged attention to the prefix, in fp16, bf16 or fp32.
    prefix_lse : Tensor [tokens, heads] float32
        Its LSE. -inf, +inf or NaN marks a row without a prefix, whose `prefix` is not used.
    sizes : ChainSizes

    Returns
    -------
    Tensor [tokens, heads, v]
        In the dtype of `prefix`.

    Raises
    ------
    ValueError
        Tokens are no multiple of `width`, or shapes do not match.
    TypeError
        A dtype is not supported.
    """
    check_states(prefix, prefix_lse, 3, "prefix", "prefix_lse")
    _check(chains, prefix, sizes)
    given = [part for part in chains if part is not None]
    if uses_kernels(prefix, prefix_lse, *given):
        # Not at module level: CPU users may have no Triton.
        from sglang_dcp.ops.chains_triton import attend_chains_triton

        return attend_chains_triton(chains, prefix, prefix_lse, sizes)
    return chains_torch.attend_chains_torch(chains, prefix, prefix_lse, sizes)


def _check(chains: Chains, prefix: Tensor, sizes: ChainSizes) -> None:
    q, k, v, q_rope, k_rope = chains
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if sizes.width < 1 or tokens % sizes.width:
        raise ValueError(f"{tokens} query tokens are not chains of {sizes.width}")
    if prefix.shape != (tokens, heads, v.shape[2]):
        raise ValueError(f"a prefix of {tuple(prefix.shape)} for q {tuple(q.shape)}")
    if k.shape != (tokens, kv_heads, dim) or v.shape[:2] != k.shape[:2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q")
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope come together")
    if q_rope is not None and k_rope is not None:
        rope = q_rope.shape[2]
        if (q_rope.shape, k_rope.shape) != (
            (tokens, heads, rope),
            (tokens, kv_heads, rope),
        ):
            raise ValueError("q_rope and k_rope must have the heads of q and k")
    if (sizes.first_head + heads - 1) // sizes.heads_of_kv >= kv_heads:
        raise ValueError(
            f"heads from {sizes.first_head} on need more than {kv_heads} K/V heads"
        )
