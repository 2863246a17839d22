"""SGLang's `ModelRunner` as an inner attention backend must see it.

An inner backend sizes its kernels and buffers from the runner when it is built. It serves
all heads of the DCP group over this rank's pool. So it needs more query heads, a
`dcp_size`-th of the positions, and physical pages.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_dcp.config import DcpConfig


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
    """

    def __init__(
        self, runner: Any, local_table: torch.Tensor, config: DcpConfig
    ) -> None:
        model = runner.model_config
        heads = model.num_attention_heads * config.dcp_size
        text = _Overlay(model.hf_text_config, num_attention_heads=heads)
        super().__init__(
            runner,
            page_size=config.page_size,
            req_to_token_pool=SimpleNamespace(
                req_to_token=local_table, size=runner.req_to_token_pool.size
            ),
            model_config=_Overlay(
                model,
                num_attention_heads=heads,
                hf_text_config=text,
                context_len=local_table.shape[1],
            ),
        )
