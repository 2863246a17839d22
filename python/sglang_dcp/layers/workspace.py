"""The size of an exchange's workspace, from SGLang's `ModelRunner`."""

from __future__ import annotations

from typing import Any

from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.exchange import WorkspaceSpec
from sglang_dcp.layers.heads import is_mla
from sglang_dcp.releases.api import sglang_api


def workspace_spec(runner: Any, config: DcpConfig) -> WorkspaceSpec:
    """Return the largest decode step of SGLang's `ModelRunner`, as an exchange sees it.

    With speculation, each request has several query tokens.
    """
    model = runner.model_config
    if is_mla(model):
        dim = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        dim = max(model.head_dim, model.v_head_dim)
    return WorkspaceSpec(
        tokens=most_query_tokens(runner, config),
        heads=model.num_attention_heads // config.tp_size,
        row_bytes=dim * runner.dtype.itemsize,
        # Shorter than SGLang's watchdog, which cannot name the ranks.
        timeout_s=0.8 * runner.server_args.watchdog_timeout,
    )


def most_query_tokens(runner: Any, config: DcpConfig) -> int:
    """Return the most query tokens of a decode step of SGLang's `ModelRunner`."""
    return most_requests(runner, config) * tokens_per_request(runner.server_args)


def most_requests(runner: Any, config: DcpConfig) -> int:
    """Return the most requests of a decode step of SGLang's `ModelRunner`.

    SGLang pads a batch to a multiple of the attention ranks where it scatters tokens over
    them.
    """
    ranks = config.tp_size
    return -(-runner.req_to_token_pool.size // ranks) * ranks


def tokens_per_request(server_args: Any) -> int:
    """Return how many query tokens a request has in a decode step.

    `server_args` is SGLang's `ServerArgs`, resolved. Without an algorithm, SGLang ignores a
    number of draft tokens.
    """
    args = sglang_api().resolved(server_args)
    if not args.speculative_algorithm:
        return 1
    return args.speculative_num_draft_tokens or 1
