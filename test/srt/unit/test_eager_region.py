"""Attention of latents as an eager region of a prefill graph: what is captured, what replays.

Only this file records a region as SGLang captures it and replays it with another batch, on
a CPU. `test_mla_prefill.py` has the forms of a prefill in such a region.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.prefill_graph import HAS_PREFILL_GRAPHS, replay
from sglang_dcp.layers.mla import eager_region

pytestmark = pytest.mark.skipif(
    not HAS_PREFILL_GRAPHS, reason="this SGLang captures attention in prefill graphs"
)

ROWS, HIDDEN = 8, 4


class Capture:
    """What `eager_on_graph` needs of SGLang's capture."""

    def __init__(self) -> None:
        self.cuda_graph = SimpleNamespace(_break_fns=[])
        self._barrier_fn = None
        self.open = True

    def _end_current_segment(self) -> None:
        assert self.open, "a region within a region"
        self.open = False

    def _begin_new_segment(self) -> None:
        self.open = True


class Attention:
    """SGLang's attention module, as the region sees it. It notes each forward."""

    def __init__(self, q_lora_rank: int | None) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention

        self.q_lora_rank = q_lora_rank
        self.alt_stream = "second"
        self.attn_mha = RadixAttention(1, HIDDEN, 1.0, 1, 0)
        self.attn_mqa = RadixAttention(1, HIDDEN, 1.0, 1, 0)
        self.calls: list[tuple[Any, ...]] = []

    def prepare_qkv_latent(self, hidden: Tensor, batch: Any) -> Tensor:
        return hidden + 1

    def forward(
        self, positions: Tensor, hidden: Tensor, batch: Any, zeros: Any, *args: Any
    ) -> Tensor:
        from sglang.srt.layers.layer_boundary import get_attn_tp_context

        assert self.alt_stream is None
        # A call of attention, which would end the segment once more.
        q = hidden.clone()
        self.attn_mha(q, q, q, batch, save_kv_cache=False)
        self.calls.append((batch, zeros, args))
        latents = torch.zeros_like(hidden)
        if self.q_lora_rank is not None:
            latents = get_attn_tp_context().fetch_qkv_latent()
        return 2 * hidden + positions[:, None] + latents


class Backend:
    """Attends to nothing."""

    def forward(self, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return q


def batch_of(tokens: int) -> Any:
    mode = SimpleNamespace(is_extend=lambda: True, is_target_verify=lambda: False)
    return SimpleNamespace(
        forward_mode=mode, global_num_token_non_padded_cpu=tokens, mha_return_lse=False
    )


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        breakable_cuda_graph,
    )

    token = breakable_cuda_graph._current_capture_var.set(capture)
    try:
        yield
    finally:
        breakable_cuda_graph._current_capture_var.reset(token)


@pytest.fixture(autouse=True)
def dcp_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_region, "find_context", object)


def run(attention: Attention, *given: Any) -> Tensor:
    found: Tensor = eager_region.attention_forward(Attention.forward, attention, *given)
    return found


@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_a_region_replays_with_the_batch_that_is_served(
    q_lora_rank: int | None,
) -> None:
    attention, capture = Attention(q_lora_rank), Capture()
    positions = torch.zeros(ROWS, dtype=torch.int64)
    hidden, made_up = torch.zeros(ROWS, HIDDEN), batch_of(ROWS)
    with replay(Backend(), made_up), capturing(capture):
        out = run(attention, positions, hidden, made_up, "spent", "more")
    assert capture.open and len(capture.cuda_graph._break_fns) == 1
    assert attention.alt_stream == "second"
    for tokens in (3, ROWS, 1):
        served = batch_of(tokens)
        hidden.fill_(float("nan"))
        hidden[:tokens], positions[:tokens] = torch.rand(tokens, HIDDEN), tokens
        with replay(Backend(), served):
            capture.cuda_graph._break_fns[0]()
        wanted = 2 * hidden[:tokens] + tokens
        if q_lora_rank is not None:
            wanted = wanted + (hidden[:tokens] + 1)
        assert torch.equal(out[:tokens], wanted)
        assert not out[tokens:].any()
        batch, zeros, more = attention.calls[-1]
        assert batch is served and more == ("more",)
        assert zeros.allocate(1).tolist() == [0.0]


def test_elsewhere_it_is_sglangs_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
        enable_breakable_cuda_graph,
    )

    attention, batch = Attention(None), batch_of(2)
    given = torch.ones(2, dtype=torch.int64), torch.ones(2, HIDDEN), batch, "zeros"

    def forward(*called: Any) -> str:
        assert called == (attention, *given)
        return "own"

    def called() -> Any:
        return eager_region.attention_forward(forward, attention, *given)

    assert called() == "own"
    decode = batch_of(2)
    decode.forward_mode.is_extend = lambda: False
    with replay(Backend(), decode):
        given = *given[:2], decode, "zeros"
        assert called() == "own"
    given = *given[:2], batch, "zeros"
    # A decode graph may be breakable too, and a verification in it extends.
    with enable_breakable_cuda_graph():
        assert called() == "own"
    monkeypatch.setattr(eager_region, "find_context", lambda: None)
    with replay(Backend(), batch):
        assert called() == "own"


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
