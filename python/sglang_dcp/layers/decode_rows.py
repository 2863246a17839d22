"""Forwards with several query tokens of a request as decode steps.

`TARGET_VERIFY` and `DRAFT_EXTEND_V2` of speculative decoding bring the same number of query
tokens for each request: a chain. As a decode step over the committed tokens, a request is
one row, whose query tokens are folded into heads. A prefill brings any number of new
tokens. As a decode step, each of them is a row with a length of its own
(`short_prefill.py`). Those of one request may be a chain as well (`chain_steps.py`).

These functions return shallow copies. SGLang's batch stays as it is.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from sglang_dcp.ops.query_rows import (
    draft_step_lens,
    draft_step_slots,
    ragged_row_lens,
    request_of_rows,
)

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def as_chains(batch: ForwardBatch) -> tuple[ForwardBatch, int]:
    """Return a decode batch over the committed tokens, and the query tokens of a request.

    `batch` is SGLang's, or in graph replay a namespace of the same fields. Any other
    forward comes back as it is, with 1. The slots are those of all query tokens. These must
    form a chain: a tree needs `--speculative-eagle-topk` above 1, which is refused at start.
    """
    mode = batch.forward_mode
    verify = mode.is_target_verify()
    if not verify and not mode.is_draft_extend_v2():
        return batch, 1
    width = batch.spec_info.num_tokens_per_req
    requests = batch.batch_size
    # A replayed extension of a draft brings SGLang's whole buffers.
    lens, lens_cpu = batch.seq_lens[:requests], batch.seq_lens_cpu[:requests]
    if not verify:
        # SGLang counts the new tokens here, and does not in a verification.
        lens, lens_cpu = lens - width, lens_cpu - width
    positions = lens
    if width == 1:
        # A decode step, which counts the key of its own token.
        lens, lens_cpu = lens + 1, lens_cpu + 1
    step = _decode_step(batch, lens, lens_cpu)
    step.req_pool_indices = batch.req_pool_indices[:requests]
    # SGLang sizes captured plans by them. Attention reads no position.
    step.positions = positions
    return step, width


def as_prefill_rows(batch: ForwardBatch) -> ForwardBatch:
    """Return a decode batch with a row for each new token of a prefill."""
    new = torch.tensor(batch.extend_seq_lens_cpu)
    prefix = torch.tensor(batch.extend_prefix_lens_cpu)
    tokens = int(new.sum())
    request = request_of_rows(batch.extend_seq_lens, tokens)
    lens = ragged_row_lens(
        batch.extend_prefix_lens.to(batch.seq_lens.dtype),
        batch.extend_seq_lens,
        request,
    )
    lens_cpu = ragged_row_lens(prefix, new, request_of_rows(new, tokens))
    rows = _decode_step(batch, lens, lens_cpu)
    rows.batch_size = tokens
    rows.req_pool_indices = batch.req_pool_indices[request]
    # SGLang has a copy of them on the host for prefills alone.
    rows.req_pool_indices_cpu = None
    rows.orig_seq_lens = lens.to(torch.int32)
    rows.is_extend_in_batch = False
    return rows


def as_one_chain(rows: ForwardBatch) -> ForwardBatch:
    """Return a verification of one request, whose query tokens are the rows of a step.

    `rows` is what `as_prefill_rows` made of a prefill of one request, or a namespace of the
    same fields in graph replay. There, SGLang may have added rows. They come last, so no
    other row sees them.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    chain = copy.copy(rows)
    chain.forward_mode = ForwardMode.TARGET_VERIFY
    chain.spec_info = SimpleNamespace(num_tokens_per_req=rows.batch_size)
    chain.batch_size = 1
    chain.req_pool_indices = rows.req_pool_indices[:1]
    # The first row sees itself too.
    chain.seq_lens, chain.seq_lens_cpu = (
        rows.seq_lens[:1] - 1,
        rows.seq_lens_cpu[:1] - 1,
    )
    return chain


def as_draft_step(batch: ForwardBatch, step: int) -> ForwardBatch:
    """Return the decode batch of step `step` of a chain that the draft model proposes.

    `batch` is SGLang's batch of all steps: its lengths are those before the first step,
    its slots those of all steps.
    """
    one = _decode_step(
        batch,
        draft_step_lens(batch.seq_lens, step),
        draft_step_lens(batch.seq_lens_cpu, step),
    )
    one.out_cache_loc = draft_step_slots(batch.out_cache_loc, batch.batch_size, step)
    return one


def _decode_step(
    batch: ForwardBatch, lens: torch.Tensor, lens_cpu: torch.Tensor
) -> ForwardBatch:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    step = copy.copy(batch)
    step.forward_mode = ForwardMode.DECODE
    # With it SGLang's backends would plan for a tree.
    step.spec_info = None
    step.seq_lens, step.seq_lens_cpu = lens, lens_cpu
    step.seq_lens_sum = int(lens_cpu.sum())
    return step
