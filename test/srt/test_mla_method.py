"""Which way DeepSeek's attention is computed, by registry entry.

Only this file sees that without DCP the choice is SGLang's own, whatever it is, and that
with DCP no mode expands latents, also not a prefill without a prefix.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import mla_method

ENTRIES = {
    "fa3": mla_method.mla_forward_method_fa3,
    "flashinfer": mla_method.mla_forward_method_flashinfer,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_without_dcp_sglang_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    monkeypatch.setattr(mla_method, "find_context", lambda: None)
    chosen = object()
    original = f"handle_attention_{name}"
    asked: list[Any] = []

    def choose(attention: Any, batch: Any) -> Any:
        asked.append((attention, batch))
        return chosen

    monkeypatch.setattr(handlers, original, choose)
    assert ENTRIES[name]("attention", "batch") is chosen
    assert asked == [("attention", "batch")]


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("name", ENTRIES)
def test_with_dcp_all_is_absorbed(
    name: str, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.models.deepseek_common.attention_forward_methods import (
        forward_methods,
    )

    context = DcpContext(DcpConfig(Layout(2, 1)), tp_rank=0)
    monkeypatch.setattr(mla_method, "find_context", lambda: context)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, extend_prefix_lens_cpu=[prefix]
    )
    found = ENTRIES[name](SimpleNamespace(), batch)
    assert found == forward_methods.AttnForwardMethod.MLA


def test_the_entries_are_those_that_sglang_registers() -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    for name in ENTRIES:
        assert callable(getattr(handlers, f"handle_attention_{name}"))
        assert name in handlers.AttentionBackendRegistry._handlers


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
