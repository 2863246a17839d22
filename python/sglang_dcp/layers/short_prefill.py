"""Short prefills as one decode step, whose CUDA graph is replayed.

The launches of its layers are what a prefill of a few new tokens takes time for. A captured
decode step has one launch. So each new token becomes a row of such a step: K and V of all
rows are written before any of them is read, and a row sees the keys up to its own. The rows of
one request may be a chain (`chain_steps.py`). Of the logits, only those of each request's last
row are kept.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from sglang_dcp.context import find_context
from sglang_dcp.layers.chain_steps import ChainSteps
from sglang_dcp.layers.decode_rows import as_prefill_rows
from sglang_dcp.layers.heads import is_mla
from sglang_dcp.layers.short_prefill_rule import Rule, rule_of
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_dcp.config import DcpConfig

logger = logging.getLogger(__name__)


class Stored(enum.Enum):
    """What a KV pool holds."""

    KV_HEADS = "K/V heads"
    LATENTS = "latents"
    OTHER_DTYPE = "another dtype than the model's"


# Attention backends, each with what is in its pool, whose short prefills as decode steps were
# compared with plain tp on GPUs, and timed. Their steps of one request may be chains. Earlier
# releases have no hook for them.
SERVED: frozenset[tuple[str, Stored]] = frozenset(
    {("fa3", Stored.KV_HEADS), ("fa3", Stored.LATENTS)}
)
SERVED_SINCE = "0.5.23"
# Turns them off, to compare a server with and without them.
SWITCH = "SGLANG_DCP_SHORT_PREFILL_STEPS"
# Most rows of a step without a graph, which takes as many launches as a prefill. Tests raise
# it where there is no graph.
MOST_EAGER_ROWS = 0

# Fields of SGLang's batch that plain prefills set. A decode step sets them too, or does not
# read them, or `is_plain` looks at them itself. With log-probabilities of new tokens alone,
# the ids of the prompt's are there and empty.
_OF_EVERY_PREFILL = frozenset(
    {
        "batch_size",
        "capture_hidden_mode",
        "contains_last_prefill_chunk",
        "extend_input_logprob_token_ids_gpu",
        "extend_logprob_start_lens_cpu",
        "extend_num_tokens",
        "extend_prefix_lens",
        "extend_prefix_lens_cpu",
        "extend_seq_lens",
        "extend_seq_lens_cpu",
        "extend_start_loc",
        "forward_mode",
        "global_num_token_non_padded",
        "global_num_token_non_padded_cpu",
        "input_ids",
        "is_extend_in_batch",
        "kv_loc_plan",
        "num_token_non_padded",
        "orig_seq_lens",
        "out_cache_loc",
        "out_cache_loc_is_physical",
        "positions",
        "req_pool_indices",
        "req_pool_indices_cpu",
        "return_logprob",
        "rids",
        "sampling_info",
        "seq_lens",
        "seq_lens_cpu",
        "seq_lens_sum",
        "spec_algorithm",
        "token_ids_logprobs",
        "top_logprobs_nums",
    }
)


def forward_raw(
    original: Callable[..., Any],
    runner: Any,
    batch: ForwardBatch,
    *args: Any,
    **kw: Any,
) -> Any:
    """Hook: `ModelRunner._forward_raw`; runs a short prefill as a decode step."""
    short = getattr(runner.attn_backend, "short_prefill", None)
    if find_context() is None or short is None:
        return original(runner, batch, *args, **kw)
    step = short.step_of(batch)
    if step is None:
        return original(runner, batch, *args, **kw)
    with nullcontext() if step.chains is None else step.chains.running():
        output = original(runner, step.batch, *args, **kw)
    output.logits_output = of_last_rows(output.logits_output, batch)
    return output


class Step(NamedTuple):
    """A short prefill as a decode step.

    Attributes
    ----------
    batch : ForwardBatch
        With a row for each new token.
    chains : ChainSteps, optional
        If the rows are to run as a chain.
    """

    batch: ForwardBatch
    chains: Optional[ChainSteps] = None


class ShortPrefill:
    """Decides for one `ModelRunner` which prefills are short.

    All ranks decide alike, by logical lengths and by what they captured alike.

    Parameters
    ----------
    runner
        SGLang's `ModelRunner`. Its graphs need not be captured yet.
    rule : Rule

    Attributes
    ----------
    rule : Rule
    chains : ChainSteps, optional
        None if no step may be a chain.
    """

    def __init__(self, runner: Any, rule: Rule) -> None:
        self._runner = runner
        self.rule = rule
        self.chains: Optional[ChainSteps] = None
        self._logged = False

    def step_of(self, batch: ForwardBatch) -> Optional[Step]:
        """Return the decode step of a short prefill, None for any other batch."""
        if not _is_prefill(batch):
            return None
        graphs = self._runner.decode_cuda_graph_runner
        rows = sum(batch.extend_seq_lens_cpu)
        # Most prefills have too many, which is cheap to see. `is_plain` looks at all fields.
        if rows > max(graphs.max_bs if graphs else 0, MOST_EAGER_ROWS):
            return None
        if not is_plain(batch):
            return None
        chain = self._chain_of(batch, rows)
        if not self.rule.pays(batch, eager=self._is_eager(batch), chain=chain):
            return None
        step = as_prefill_rows(batch)
        captured = graphs is not None and graphs.can_run_graph(step)
        if not captured and rows > MOST_EAGER_ROWS:
            return None
        if not self._logged:
            self._logged = True
            logger.info("DCP prefill of %d tokens is one decode step", rows)
        return Step(step, None if chain is None else self.chains)

    def _chain_of(self, batch: ForwardBatch, rows: int) -> Optional[int]:
        """Return of how many tokens a chain of so many rows is, if that is faster."""
        if self.chains is None or batch.batch_size > 1:
            return None
        graphs, width = self._runner.decode_cuda_graph_runner, rows
        if graphs is not None:
            width = min((size for size in graphs.capture_bs if size >= rows), default=0)
        if not self.chains.serves(width, captured=graphs is not None):
            return None
        (prefix,) = batch.extend_prefix_lens_cpu
        return width if self.rule.chain_is_faster(rows, prefix, width) else None

    def _is_eager(self, batch: ForwardBatch) -> bool:
        """Whether the launches are those of an eager prefill: no prefill graph fits.

        The attention of latents is launched eagerly in such a graph too. What is left of
        the launches was not timed.
        """
        graphs = self._runner.prefill_cuda_graph_runner
        if graphs is None or is_mla(self._runner.model_config):
            return True
        return not graphs.can_run_graph(batch)


def is_plain(batch: ForwardBatch) -> bool:
    """Whether a batch is a prefill of token ids that asks for next tokens alone.

    Any field that a plain prefill leaves alone makes it another one: embeddings, images,
    adapters, replicas of DP attention, fields of later releases.
    """
    if not _is_prefill(batch):
        return False
    if (
        batch.capture_hidden_mode is not None
        and batch.capture_hidden_mode.need_capture()
    ):
        return False
    names = (field.name for field in dataclasses.fields(batch))
    others = (name for name in names if name not in _OF_EVERY_PREFILL)
    if any(_is_set(getattr(batch, name)) for name in others):
        return False
    return not _wants_input_logprobs(batch)


def _is_prefill(batch: ForwardBatch) -> bool:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.MIXED)


def _is_set(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict, set)):
        return any(map(_is_set, value))
    if isinstance(value, (bool, int, float)):
        return bool(value)
    return value is not None


def _wants_input_logprobs(batch: ForwardBatch) -> bool:
    if not batch.return_logprob:
        return False
    starts = batch.extend_logprob_start_lens_cpu
    return any(start < new for start, new in zip(starts, batch.extend_seq_lens_cpu))


def of_last_rows(logits: Any, batch: ForwardBatch) -> Any:
    """Return SGLang's logits of a decode step as those of the prefill `batch`."""
    last = batch.extend_seq_lens.cumsum(0) - 1
    return dataclasses.replace(logits, next_token_logits=logits.next_token_logits[last])


def short_prefill_of(runner: Any, config: DcpConfig) -> Optional[ShortPrefill]:
    """Return what decides for a runner; None where no prefill is a decode step.

    With speculation, a captured step has several query tokens of each request. With DP
    attention each batch has the tokens of other replicas beside it, and stays. With LoRA,
    adapters are set up for the requests of a batch, not for rows. In deterministic inference
    a token may not depend on the other requests of its batch.
    """
    if not in_range(sglang_version(), SERVED_SINCE, None):
        return None
    if os.environ.get(SWITCH) == "0":
        return None
    args = sglang_api().resolved(runner.server_args)
    if (args.attention_backend, stored_in(runner)) not in SERVED:
        return None
    if args.speculative_algorithm or config.layout.replicas > 1:
        return None
    if args.enable_lora or args.lora_paths or args.enable_deterministic_inference:
        return None
    return ShortPrefill(runner, rule_of(runner, config))


def stored_in(runner: Any) -> Stored:
    """Return what the KV pool of SGLang's `ModelRunner` holds."""
    if runner.token_to_kv_pool.dtype != runner.dtype:
        return Stored.OTHER_DTYPE
    return Stored.LATENTS if is_mla(runner.model_config) else Stored.KV_HEADS
