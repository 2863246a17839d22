"""Which servers keep SGLang's prefill CUDA graphs.

SGLang 0.5.23 cuts a breakable graph at each attention layer. Attention then runs eagerly
between two segments, with the metadata of the real batch. So DCP attention over K/V heads
runs there as in an eager prefill. For latents, DCP cuts around the attention module
(`layers/mla/eager_region.py`). All other servers prefill eagerly.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from sglang_dcp.config import DcpConfig
from sglang_dcp.layers.heads import is_mla
from sglang_dcp.releases.installed import in_range
from sglang_dcp.support.quantization import format_of
from sglang_dcp.support.rules import Value, above, below, given, other_graph

# Attention backends whose servers with prefill graphs were compared with tp 1 on GPUs.
SERVED = frozenset({"fa3", "flashinfer", "triton"})
# The same of models with latents. `fa3` was compared, but not timed with a GPU for each rank.
SERVED_LATENTS: frozenset[str] = frozenset()

# First release whose breakable graphs run attention with the metadata of the real batch.
_SINCE = "0.5.23"


class EagerPrefill(NamedTuple):
    """A server argument with which prefill stays eager.

    `value` returns something if the case applies, else None. It reads arguments of 0.5.23,
    resolved or not.
    """

    flag: str
    value: Value
    reason: str


def _named_backends(args: Any) -> frozenset[str]:
    """A backend that is not chosen yet may turn out to be served."""
    return frozenset({args.attention_backend, args.prefill_attention_backend} - {None})


def _unserved_backend(args: Any) -> Optional[str]:
    return min(_named_backends(args) - SERVED, default=None)


def _replicas(args: Any) -> Optional[int]:
    number: int = args.dcp.layout.replicas
    return number if number > 1 else None


EAGER_PREFILL: tuple[EagerPrefill, ...] = (
    EagerPrefill(
        "--cuda-graph-backend-prefill",
        other_graph("prefill", "breakable"),
        "other graphs capture attention, and its local batch changes between forwards",
    ),
    EagerPrefill(
        "--attention-backend",
        _unserved_backend,
        "its prefill in graphs was never compared with tp 1 on a GPU",
    ),
    EagerPrefill(
        "--chunked-prefill-size",
        below("chunked_prefill_size", 1),
        "whole prompts have no largest size to capture, and SGLang captures none",
    ),
    EagerPrefill(
        "--attn-dp-size",
        _replicas,
        "replicas vote on a replay, and one without a request replays padding",
    ),
    EagerPrefill(
        "--speculative-algorithm",
        given("speculative_algorithm"),
        "a draft's extension runs as a decode step, with all heads of a replicated Q, and a "
        "segment holds the Q projection of a prefill",
    ),
    EagerPrefill(
        "--enable-lora",
        given("enable_lora"),
        "adapters in prefill graphs were never compared with tp 1",
    ),
    EagerPrefill(
        "--lora-paths",
        given("lora_paths"),
        "adapters in prefill graphs were never compared with tp 1",
    ),
    EagerPrefill(
        "--enable-memory-saver",
        given("enable_memory_saver"),
        "SGLang refuses breakable graphs whose memory is released",
    ),
    EagerPrefill(
        "--moe-a2a-backend",
        given("moe_a2a_backend", "none"),
        "its exchange of tokens in prefill graphs was never compared with tp 1",
    ),
    EagerPrefill(
        "--ep-size",
        above("ep_size", 1),
        "groups of experts were never compared in prefill graphs",
    ),
    EagerPrefill(
        "--moe-dense-tp-size",
        above("moe_dense_tp_size", 0),
        "tokens are scattered over ranks, which was never compared in prefill graphs",
    ),
    EagerPrefill(
        "--enable-layernorm-sp",
        given("enable_layernorm_sp"),
        "tokens are scattered over ranks, which was never compared in prefill graphs",
    ),
)


def needs_eager_prefill(model: Any, config: DcpConfig, args: Any) -> bool:
    """Whether a server prefills eagerly because of its model.

    Quantized weights were not compared in such graphs where Q is replicated or latents are
    cached. `model` is SGLang's `ModelConfig`, `args` a `ServerArgs`, resolved or not.
    """
    if not is_mla(model):
        return config.replicate_q_proj and format_of(model) is not None
    unserved = _named_backends(args) - SERVED_LATENTS
    return not SERVED_LATENTS or bool(unserved) or format_of(model) is not None


def keeps_prefill_graphs(
    args: Any, release: str, *, on_gpu: bool, eager_model: bool = False
) -> bool:
    """Whether a server keeps SGLang's breakable prefill graphs, if it has any.

    Parameters
    ----------
    args
        A `ServerArgs` with `dcp` set, resolved or not.
    release : str
        Number of the SGLang release.
    on_gpu : bool
        Whether the server runs on GPUs.
    eager_model : bool
        What `needs_eager_prefill` says of the model; False while it is not known.
    """
    if eager_model or not (on_gpu and in_range(release, _SINCE, None)):
        return False
    return all(row.value(args) is None for row in EAGER_PREFILL)
