"""SGLang's `ModelRunner` as an inner attention backend must see it.

An inner backend sizes its kernels and buffers from the runner when it is built. It serves
all heads of the DCP group over this rank's pool. So it needs more query heads, a
`dcp_size`-th of the positions, and physical pages. Where a request has several query tokens
in a decode step, they are heads of one query, so it needs as many times the heads.
"""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any, Optional

import torch

from sglang_dcp.config import DcpConfig
from sglang_dcp.layers.heads import is_mla, kv_head_counts
from sglang_dcp.ops.query_rows import folding_of


class _Overlay:
    """The attributes of `base`, with some of them replaced."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self._base = base
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class RunnerView(_Overlay):
    """A runner that shows this rank's slots and pages, and the DCP group's query heads.

    Parameters
    ----------
    runner
        SGLang's `ModelRunner`.
    local_table : Tensor [requests, local positions]
        Slots of this rank's pool.
    config : DcpConfig
    requests : int
        Most requests of a decode step.
    width : int
        Query tokens of each request in a decode step.
    head_tile : int, optional
        See `folding_of`.
    """

    def __init__(
        self,
        runner: Any,
        local_table: torch.Tensor,
        config: DcpConfig,
        requests: int,
        width: int = 1,
        head_tile: Optional[int] = None,
    ) -> None:
        super().__init__(
            runner,
            page_size=config.page_size,
            req_to_token_pool=SimpleNamespace(req_to_token=local_table, size=requests),
            model_config=_model_view(
                runner.model_config,
                _heads_factor(runner.model_config, config, width, head_tile),
                local_table.shape[1],
            ),
            **_local_translator(runner, local_table, config.page_size),
        )


def _heads_factor(
    model: Any, config: DcpConfig, width: int, head_tile: Optional[int]
) -> Fraction:
    """Return how many times a rank's query heads an inner backend serves."""
    heads = model.num_attention_heads // config.tp_size * config.dcp_size
    kv_heads = 1
    if width > 1 and not is_mla(model):
        kv_heads = config.layout.kv_heads_per_rank(kv_head_counts(model)[0])
    folded = folding_of(width, heads, kv_heads, head_tile).heads
    return Fraction(folded * config.dcp_size, heads)


def _model_view(model: Any, factor: Fraction, positions: int) -> _Overlay:
    """Return SGLang's `ModelConfig` with the heads and positions of an inner backend."""
    heads = int(model.num_attention_heads * factor)
    replaced: dict[str, Any] = {
        "num_attention_heads": heads,
        "hf_text_config": _Overlay(model.hf_text_config, num_attention_heads=heads),
        "context_len": positions,
    }
    if hasattr(model, "get_max_num_attention_heads"):
        # A bound method reads its own object, not the attributes replaced above.
        most = int(model.get_max_num_attention_heads() * factor)
        replaced["get_max_num_attention_heads"] = lambda: most
    return _Overlay(model, **replaced)


def _local_translator(
    runner: Any, local_table: torch.Tensor, page_size: int
) -> dict[str, Any]:
    """Replace the runner's translator, if its release reads slots through one.

    The runner's own holds the logical table. The new one hands out local slots as they
    are.

    Raises
    ------
    RuntimeError
        SGLang would translate or divide local slots once more.
    """
    if not hasattr(runner, "kv_index_translator"):
        return {}
    from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

    translator = KVIndexTranslator(
        req_to_token=local_table,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        token_to_kv_pool=runner.token_to_kv_pool,
        page_size=page_size,
        device=runner.device,
        is_draft_worker=runner.is_draft_worker,
    )
    if translator.needs_read_translate:
        raise RuntimeError(
            "SGLang would translate the slots of a rank's pool once more: it has a "
            "unified memory pool, or its own decode context parallelism is on"
        )
    return {"kv_index_translator": translator}
