"""Which prefills of a runner take less time as decode steps: its sizes and its graphs.

The estimates themselves are pure functions (`prefix/decode_step.py`, `prefix/kv_form.py`,
`mla/form.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from sglang_dcp.layers.chain_steps import WIDTHS
from sglang_dcp.layers.heads import is_mla, kv_head_counts
from sglang_dcp.layers.kv_prefill import kv_sizes, kv_sizes_of
from sglang_dcp.layers.mla import form
from sglang_dcp.layers.mla.dispatch import prefill_batch
from sglang_dcp.layers.mla.sizes import mla_sizes
from sglang_dcp.layers.prefix import kv_form
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.decode_step import (
    StepSizes,
    chain_is_faster,
    pays_as_step,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.config import DcpConfig


class Rule(NamedTuple):
    """What decides for one runner.

    Attributes
    ----------
    sizes : of the runner's attention in a decode step
    added : tells of a prefill what its form adds to the launches of a layer, in seconds
    """

    sizes: StepSizes
    added: Callable[[ForwardBatch], float]

    def pays(
        self, batch: ForwardBatch, *, eager: bool, chain: Optional[int] = None
    ) -> bool:
        """Whether a prefill takes less time as a captured step; the same on all ranks.

        `chain` is the number of tokens of the chain that the step is, if it is one.
        """
        of = Requests.of(batch), self.sizes, self.added(batch)
        return pays_as_step(*of, eager=eager, chain=chain)

    def chain_is_faster(self, new: int, prefix: int, width: int) -> bool:
        """Whether the step of a request takes less time as a chain of `width` tokens."""
        return chain_is_faster(new, prefix, width, self.sizes)

    def has_chains(self, context: int) -> bool:
        """Whether any step is faster as a chain, if requests have up to `context` tokens.

        With many heads over latents none is. Attention multiplies for longer than it reads.
        """
        longest = WIDTHS[-1]
        return self.chain_is_faster(longest, context, longest)


def rule_of(runner: Any, config: DcpConfig) -> Rule:
    """Return the rule of SGLang's `ModelRunner`."""
    return Rule(step_sizes(runner, config), added_by_form(runner, config))


def added_by_form(runner: Any, config: DcpConfig) -> Callable[[ForwardBatch], float]:
    """Return what tells of a prefill how many seconds its form adds to a layer."""
    if is_mla(runner.model_config):
        latents = mla_sizes(runner, config)
        return lambda batch: form.added_seconds(prefill_batch(batch), latents)
    heads, gathers = kv_sizes(runner, config), kv_sizes_of(runner, config) is not None
    return lambda batch: kv_form.added_seconds(
        Requests.of(batch), heads, gathers=gathers
    )


def step_sizes(runner: Any, config: DcpConfig) -> StepSizes:
    """Return the sizes of a runner's attention in a decode step."""
    model, stored = runner.model_config, runner.token_to_kv_pool.dtype.itemsize
    if is_mla(model):
        qk, v, kv_heads = (
            model.kv_lora_rank + model.qk_rope_head_dim,
            model.kv_lora_rank,
            1,
        )
        numbers = qk
    else:
        qk, v = model.head_dim, model.v_head_dim
        kv_heads = config.layout.kv_heads_per_rank(kv_head_counts(model)[0])
        numbers = qk + v
    return StepSizes(
        heads=model.num_attention_heads // config.tp_size,
        kv_heads=kv_heads,
        dcp_size=config.dcp_size,
        key_bytes=kv_heads * numbers * stored,
        query_bytes=qk * runner.dtype.itemsize,
        out_bytes=v * runner.dtype.itemsize,
        dims=qk + v,
    )
