"""The choice between the forms of DeepSeek's prefill: a pure function of logical lengths.

The form that takes least time by `cost` and the rates of the GPU is chosen. Logical lengths
are the same on all ranks, so all ranks choose the same form and issue the same
collectives.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Optional

from sglang_dcp.layers.mla import cost, groups
from sglang_dcp.layers.mla.cost import MlaSizes, Requests
from sglang_dcp.layers.prefix.rates import HOPPER, Rates

# Each prefix chunk keeps a plan for the whole forward, and FlashInfer a wrapper for ever.
# Requests that share a prefix each gather it, so the size of the pool is no bound.
MOST_PREFIX_CHUNKS = 64
# Head dims of Q and K, and of V. The kernels of both backends were checked with them.
MHA_HEAD_DIMS = (192, 128)


class PrefillForm(Enum):
    """How a prefill attends to its keys.

    `ABSORBED` attends to latents. The other forms expand them to the rank's local heads.
    `NO_PREFIX` has new tokens alone, `ONE_SHOT` takes all positions in one call, and
    `PREFIX_CHUNKS` takes the new tokens and then the prefix in chunks. `BY_GROUP` is
    `PREFIX_CHUNKS` for some requests, and keeps the prefixes of the others in place.
    """

    ABSORBED = "absorbed"
    NO_PREFIX = "no prefix"
    ONE_SHOT = "one shot"
    PREFIX_CHUNKS = "prefix chunks"
    BY_GROUP = "by group"


class PrefillBatch(NamedTuple):
    """Requests of a batch, and the most positions that SGLang expands in one call."""

    requests: Requests
    capacity: int

    @property
    def prefix(self) -> int:
        return sum(self.requests.prefix)

    @property
    def positions(self) -> int:
        return self.prefix + sum(self.requests.new)

    @property
    def most_gathered(self) -> int:
        """Most positions of prefixes that may be gathered."""
        return MOST_PREFIX_CHUNKS * self.capacity


def choose_prefill_form(
    batch: PrefillBatch,
    sizes: MlaSizes,
    *,
    expand_prefix: bool,
    by_group: bool = False,
    rates: Rates = HOPPER,
) -> PrefillForm:
    """Choose the form of a prefill. The result is the same on all ranks of the DCP group.

    Of forms that take as long, the one with fewer launches is chosen.

    Parameters
    ----------
    expand_prefix : False under `--disable-chunked-prefix-cache`
    by_group : whether requests may take different forms
    """
    if (sizes.nope + sizes.rope, sizes.v) != MHA_HEAD_DIMS:
        return PrefillForm.ABSORBED
    form = expanded_form(batch)
    if form is PrefillForm.NO_PREFIX:
        return form
    if not expand_prefix:
        return PrefillForm.ABSORBED
    seconds: dict[PrefillForm, float] = {}
    if batch.prefix <= batch.most_gathered:
        seconds[form] = expanded_seconds(batch, form, sizes, rates)
    seconds[PrefillForm.ABSORBED] = cost.in_place_seconds(batch.requests, sizes, rates)
    if by_group and (found := groups_of(batch, sizes, rates)):
        seconds[PrefillForm.BY_GROUP] = found.seconds
    return min(seconds, key=seconds.__getitem__)


def groups_of(
    batch: PrefillBatch, sizes: MlaSizes, rates: Rates = HOPPER
) -> Optional[groups.Groups]:
    """Share out a batch for a prefill by group; None if there is nothing to share out."""
    limits = batch.most_gathered, batch.capacity
    return groups.best_groups(batch.requests, *limits, sizes, rates)


def added_seconds(
    batch: PrefillBatch, sizes: MlaSizes, *, rates: Rates = HOPPER
) -> float:
    """Time what the form of a short prefill adds to the launches of a layer.

    That is the form with the shortest estimated time, without groups. A server that a flag
    or its backend keeps from this form takes longer.
    """
    form = choose_prefill_form(batch, sizes, expand_prefix=True, rates=rates)
    if form is PrefillForm.NO_PREFIX:
        return 0.0
    if form is PrefillForm.ABSORBED:
        return cost.in_place_seconds(batch.requests, sizes, rates)
    return expanded_seconds(batch, form, sizes, rates)


def expanded_form(batch: PrefillBatch) -> PrefillForm:
    """Choose among the forms that expand latents of whole batches."""
    if not batch.prefix:
        return PrefillForm.NO_PREFIX
    one_shot = batch.positions <= batch.capacity
    return PrefillForm.ONE_SHOT if one_shot else PrefillForm.PREFIX_CHUNKS


def expanded_seconds(
    batch: PrefillBatch, form: PrefillForm, sizes: MlaSizes, rates: Rates
) -> float:
    """Time `form`, which expands a prefix."""
    if form is PrefillForm.ONE_SHOT:
        return cost.one_shot_seconds(batch.requests, sizes, rates)
    return cost.prefix_chunks_seconds(batch.requests, batch.capacity, sizes, rates)
