"""MLA attention in SGLang's prefill graphs: a layer's whole attention is an eager region.

SGLang cuts a breakable graph at the attention call, so a segment holds the projections of one
form of a prefill (`form.py`). The form depends on the prefix, and it is chosen in Python. So
here the graph is cut around the attention module. Its projections, its form and its
collectives run between two segments, on the real tokens, as in an eager prefill. What is
captured is the rest of a layer: norms, the MLP or the experts, and the all-reduces.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable

import torch

from sglang_dcp.context import find_context

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# What SGLang's absorbed form takes from its allocator in a layer, in float32.
_SCALES = 2


def attention_forward(
    original: Callable[..., Any],
    attention: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: ForwardBatch,
    zero_allocator: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Hook: `DeepseekV2AttentionMLA.forward`; an eager region in a prefill graph.

    Parameters
    ----------
    positions : Tensor [rows] int64
    hidden_states : Tensor [rows, hidden]
        In a prefill graph these are SGLang's static rows. The real tokens come first.

    Returns
    -------
    Tensor [rows, hidden]
        In a prefill graph the rows behind the real tokens are 0.
    """
    if find_context() is None or not _is_in_segments(forward_batch):
        more = (hidden_states, forward_batch, zero_allocator)
        return original(attention, positions, *more, *args, **kwargs)
    out = torch.empty_like(hidden_states)
    _eager_region()(original, attention, positions, hidden_states, out, args, kwargs)
    return out


def _is_in_segments(batch: ForwardBatch) -> bool:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        is_in_breakable_cuda_graph,
    )
    from sglang.srt.model_executor.runner_utils.prefill_graph import (
        is_in_prefill_graph_scope,
    )

    return (
        is_in_breakable_cuda_graph()
        and is_in_prefill_graph_scope()
        and batch.forward_mode.is_extend()
    )


@functools.cache
def _eager_region() -> Callable[..., None]:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        eager_on_graph,
    )

    region: Callable[..., None] = eager_on_graph(_attend)
    return region


def _attend(
    original: Callable[..., torch.Tensor],
    attention: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    out: torch.Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Run the attention module on the real tokens of the batch that is served now."""
    from sglang.srt.layers.layer_boundary import get_attn_tp_context
    from sglang.srt.model_executor.runner_utils.forward_batch import get_forward_batch
    from sglang.srt.utils import BumpAllocator

    batch = get_forward_batch()
    tokens = batch.global_num_token_non_padded_cpu
    given = hidden_states[:tokens]
    # The allocator of the capture is used up. Absorbed products in fp8 take from it.
    zeros = BumpAllocator(_SCALES, torch.float32, given.device)
    _offer_latents(attention, given, batch)
    with _uncut(attention):
        more = (given, batch, zeros)
        found = original(attention, positions[:tokens], *more, *args, **kwargs)
    # The projected latents of a layer must not outlive it.
    get_attn_tp_context().clear_attn_inputs()
    out[:tokens].copy_(found)
    out[tokens:].zero_()


@contextmanager
def _uncut(attention: Any) -> Iterator[None]:
    """Within it, the attention module takes no notice of the graph around it.

    Its calls of attention would end a segment that has ended. Its second stream would be
    joined to a capture that has stopped.
    """
    stream, attention.alt_stream = attention.alt_stream, None
    # For good: no call of these layers is in a segment.
    for layer in (attention.attn_mha, attention.attn_mqa):
        layer.use_prefill_attention_wrapper = False
    try:
        yield
    finally:
        attention.alt_stream = stream


def _offer_latents(
    attention: Any, hidden_states: torch.Tensor, batch: ForwardBatch
) -> None:
    """Tell SGLang what the latents of Q come from, as its layer does before attention."""
    from sglang.srt.layers.layer_boundary import AttentionInputs, get_attn_tp_context

    if attention.q_lora_rank is not None:
        make = attention.prepare_qkv_latent
        inputs = AttentionInputs(hidden_states, batch, make)
        get_attn_tp_context().set_attn_inputs(inputs)
