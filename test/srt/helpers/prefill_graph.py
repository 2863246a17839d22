"""A prefill as SGLang 0.5.23 replays it from a breakable graph, without the graph.

The runner plans attention over the real batch. Then each attention layer gets static
tensors of a larger bucket and a batch of the same size, and runs eagerly between two
segments. The flags that say so are Python's, so a CPU takes the same path.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_dcp.releases.installed import in_range, sglang_version

# The older release captures attention in its prefill graphs.
HAS_PREFILL_GRAPHS = in_range(sglang_version(), "0.5.23", None)
NAN = float("nan")


def static_batch(batch: Any, bucket: int) -> Any:
    """The batch that layers see: slots of a bucket, and `EXTEND` for mixed batches too.

    The slots behind the real ones are those of an earlier, longer batch.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    static, tokens = copy.copy(batch), len(batch.out_cache_loc)
    static.forward_mode = ForwardMode.EXTEND
    static.out_cache_loc = pad(
        batch.out_cache_loc, (0, bucket - tokens), value=int(batch.out_cache_loc[0])
    )
    static.global_num_token_non_padded_cpu = tokens
    return static


def padded(rows: Tensor, bucket: int) -> Tensor:
    """Rows of a bucket. NaN stands for what an earlier replay left behind."""
    return torch.cat([rows, rows.new_full((bucket - len(rows), *rows.shape[1:]), NAN)])


@contextmanager
def replay(backend: Any, static: Any) -> Iterator[None]:
    """The scopes of a replay, around the layers."""
    from sglang.srt.model_executor.forward_context import (
        ForwardContext,
        forward_context,
    )
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        enable_breakable_cuda_graph,
    )
    from sglang.srt.model_executor.runner_utils.forward_batch import set_forward_batch
    from sglang.srt.model_executor.runner_utils.prefill_graph import (
        prefill_graph_scope,
    )

    tokens = static.global_num_token_non_padded_cpu
    with (
        enable_breakable_cuda_graph(),
        set_forward_batch(static),
        prefill_graph_scope(full_graph=False, raw_num_tokens=tokens),
        forward_context(ForwardContext(attn_backend=backend)),
    ):
        yield
