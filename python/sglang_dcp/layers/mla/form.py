"""The choice between the forms of DeepSeek's prefill: a pure function of logical lengths.

A latent is one head for all query heads. So the latents of a request are often fewer
numbers than the queries and partial outputs that an exchange carries. For DeepSeek's sizes
it is `positions x 576` against `new tokens x heads x 1088`.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

# Head dims of Q and K, and of V. The kernels of both backends were checked with them.
MHA_HEAD_DIMS = (192, 128)


class PrefillForm(Enum):
    """How a prefill attends to its keys.

    `ABSORBED` attends to latents. The other forms expand them to the rank's local heads.
    `NO_PREFIX` has new tokens alone, `ONE_SHOT` takes all positions in one call, and
    `PREFIX_CHUNKS` takes the new tokens and then the prefix in chunks.
    """

    ABSORBED = "absorbed"
    NO_PREFIX = "no prefix"
    ONE_SHOT = "one shot"
    PREFIX_CHUNKS = "prefix chunks"


class PrefillBatch(NamedTuple):
    """Logical positions of a batch: its prefixes, its new tokens, and one prefix chunk.

    `capacity` is the most positions that SGLang expands in one call.
    """

    prefix: int
    new: int
    capacity: int


def choose_prefill_form(
    batch: PrefillBatch,
    *,
    head_dims: tuple[int, int],
    expand_prefix: bool,
    group_heads: int,
    latent: int,
    rope: int,
) -> PrefillForm:
    """Choose the form of a prefill. The result is the same on all ranks of the DCP group.

    Parameters
    ----------
    head_dims : head dims of Q and K, and of V, when expanded
    expand_prefix : False under `--disable-chunked-prefix-cache`
    group_heads : query heads of the DCP group
    latent, rope : sizes of a latent and of its rotary key
    """
    if head_dims != MHA_HEAD_DIMS:
        return PrefillForm.ABSORBED
    gather = expand_prefix and should_gather_latents(
        batch.prefix + batch.new,
        batch.new,
        group_heads=group_heads,
        latent=latent,
        rope=rope,
    )
    if batch.prefix and not gather:
        return PrefillForm.ABSORBED
    return expanded_form(batch)


def expanded_form(batch: PrefillBatch) -> PrefillForm:
    """Choose among the forms that expand latents."""
    if not batch.prefix:
        return PrefillForm.NO_PREFIX
    one_shot = batch.prefix + batch.new <= batch.capacity
    return PrefillForm.ONE_SHOT if one_shot else PrefillForm.PREFIX_CHUNKS


def should_gather_latents(
    positions: int, new: int, *, group_heads: int, latent: int, rope: int
) -> bool:
    """Whether gathering latents of `positions` moves no more than an exchange for `new`.

    The exchange carries queries and partial outputs of the `group_heads` heads of the DCP
    group. The rule counts numbers, not bytes. By bytes, fp8 latents would allow up to
    twice as many positions.
    """
    key = latent + rope
    return positions * key <= new * group_heads * (key + latent)
