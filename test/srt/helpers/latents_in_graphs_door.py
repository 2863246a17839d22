"""A door in what keeps prefills of latents out of SGLang's prefill graphs.

DCP keeps these graphs only where GPU servers have shown them right. The plugin of a server
opens that door in its processes only.

A CPU captures nothing. There each prefill of latents takes the path of a replay: the layers
get more rows than there are tokens, and attention finds the tokens by itself. Rank 0 logs
each layer's region.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

BACKENDS = ("fa3",)
# Rows that a replay has beyond its tokens.
PADDING = 3
LINE = "latents in a prefill graph, eager region over"


def tokens_in(log: str) -> list[int]:
    """Return the tokens of each eager region that rank 0 of a CPU server logged."""
    return [int(count) for count in re.findall(rf"{LINE} (\d+) tokens", log)]


def open_door() -> None:
    """Let servers of this process prefill latents in graphs, or as if in one."""
    from sglang_dcp.layers.mla import eager_region
    from sglang_dcp.support import prefill_graphs

    prefill_graphs.SERVED_LATENTS = frozenset(BACKENDS)  # type: ignore[misc]
    if not torch.cuda.is_available():
        setattr(eager_region, "_attend", _logging(eager_region._attend))
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        target = "sglang.srt.models.{}.forward"
        for layers in ("deepseek_v2.DeepseekV2Model", "glm4_moe_lite.Glm4MoeLiteModel"):
            HookRegistry.register(target.format(layers), replayed, HookType.AROUND)


def replayed(
    original: Callable[..., Any],
    layers: Any,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Hook: run the layers of a prefill as the runner of prefill graphs replays them."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    from helpers.prefill_graph import replay, static_batch

    if not forward_batch.forward_mode.is_extend():
        return original(layers, input_ids, positions, forward_batch, *args, **kwargs)
    tokens = len(input_ids)
    static = static_batch(forward_batch, tokens + PADDING)
    with replay(get_attn_backend(), static):
        rows = (_padded(part) for part in (input_ids, positions))
        out = original(layers, *rows, static, *args, **kwargs)
    return out[:tokens]


def _logging(attend: Callable[..., None]) -> Callable[..., None]:
    from sglang.srt.model_executor.runner_utils.forward_batch import get_forward_batch

    def logged(*args: Any) -> None:
        if torch.distributed.get_rank() == 0:
            tokens = get_forward_batch().global_num_token_non_padded_cpu
            print(f"{LINE} {tokens} tokens", flush=True)
        attend(*args)

    return logged


def _padded(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, PADDING))
