"""Speculative decoding that does not work with DCP.

Each query token of a verification sees all positions before it. So drafts must be chains.
"""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.support.rules import (
    DROP,
    Unsupported,
    Value,
    above,
    given,
    runs_on_gpu,
)

# Algorithms whose servers on GPUs passed the comparison with tp 1, with each attention
# backend. SGLang has no kernels for a CPU that verify.
SERVED: tuple[str, ...] = ("EAGLE", "EAGLE3", "NGRAM", "STANDALONE")
SERVED_ON_CPU: tuple[str, ...] = ()

_TREE = "a token of a verification sees all those before it, so drafts must be chains"
_UNPROVEN = "servers with it were not compared with tp 1 on such a device"


def algorithm_of(args: Any) -> Optional[str]:
    """Return the algorithm by the name that decides, or None without speculation.

    With `--enable-return-aux-hidden-states` it only names a way to capture hidden states.
    """
    if getattr(args, "enable_return_aux_hidden_states", False):
        return None
    name: str = (args.speculative_algorithm or "").upper()
    return {"NEXTN": "EAGLE"}.get(name, name) or None


def _unserved(args: Any) -> Optional[str]:
    name = algorithm_of(args)
    served = SERVED if runs_on_gpu(args.device) else SERVED_ON_CPU
    return None if name in (None, *served) else args.speculative_algorithm


def _while_speculating(value: Value, *algorithms: str) -> Value:
    """Apply `value` with one of `algorithms`, or with any if none is named."""

    def applies(args: Any) -> Optional[Any]:
        name = algorithm_of(args)
        if name is None or (algorithms and name not in algorithms):
            return None
        return value(args)

    return applies


def _breadth(args: Any) -> Optional[int]:
    breadth: int = args.speculative_ngram_max_bfs_breadth
    return None if breadth == 1 else breadth


UNSUPPORTED_SPECULATION: tuple[Unsupported, ...] = (
    Unsupported(
        "--speculative-algorithm",
        given("speculative_algorithm"),
        "its workers were made for the speculation of SGLang 0.5.23",
        DROP,
        until="0.5.23",
    ),
    Unsupported("--speculative-algorithm", _unserved, _UNPROVEN, DROP, since="0.5.23"),
    Unsupported(
        "--speculative-eagle-topk",
        _while_speculating(above("speculative_eagle_topk", 1)),
        _TREE,
        "use --speculative-eagle-topk 1",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-ngram-max-bfs-breadth",
        _while_speculating(_breadth, "NGRAM"),
        _TREE,
        "use --speculative-ngram-max-bfs-breadth 1",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-ngram-external-sam-budget",
        _while_speculating(above("speculative_ngram_external_sam_budget", 0), "NGRAM"),
        "the drafts of two sources form a tree, and " + _TREE,
        "use --speculative-ngram-external-sam-budget 0",
        since="0.5.23",
    ),
    Unsupported(
        "--attn-dp-size",
        _while_speculating(above("attn_dp_size", 1)),
        "a replica without a request would miss the forwards of the draft",
        "use --attn-dp-size 1 and no --enable-dp-attention",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-adaptive",
        _while_speculating(given("speculative_adaptive")),
        "attention plans one number of query tokens for each request",
        "drop the flag",
        since="0.5.23",
    ),
    Unsupported(
        "--enable-multi-layer-eagle",
        _while_speculating(given("enable_multi_layer_eagle")),
        "its draft layers run with attention backends of their own",
        "drop the flag",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-draft-window-size",
        _while_speculating(given("speculative_draft_window_size")),
        "a window needs positions that a rank's local table does not hold",
        "drop the flag",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-draft-attention-backend",
        _while_speculating(given("speculative_draft_attention_backend")),
        "draft and target share one choice of attention backend",
        "name one backend with --attention-backend",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-draft-kv-cache-dtype",
        _while_speculating(given("speculative_draft_kv_cache_dtype", "auto")),
        "draft and target share one choice of KV-cache dtype",
        "use --kv-cache-dtype",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-draft-load-format",
        _while_speculating(
            given("speculative_draft_load_format", "auto", "safetensors", "dummy")
        ),
        "its weights may be cut for tensor parallelism without DCP",
        "use --speculative-draft-load-format auto and the whole checkpoint",
        since="0.5.23",
    ),
    Unsupported(
        "--speculative-moe-a2a-backend",
        _while_speculating(given("speculative_moe_a2a_backend", "none")),
        "tokens would be scattered over ranks that must all see them",
        "use --speculative-moe-a2a-backend none",
        since="0.5.23",
    ),
)
