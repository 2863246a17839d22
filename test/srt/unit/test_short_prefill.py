"""Short prefills as decode steps: which batches may be one, when it pays, which logits stay.

That a row sees the right keys is in `test_query_rows.py`, and that whole servers answer as
tp 1 in `server/test_server_equality.py`.
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)

from helpers.needs_sglang import needs_sglang
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import short_prefill
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.decode_step import StepSizes, pays_as_step, step_seconds
from sglang_dcp.layers.prefix.rates import HOPPER
from sglang_dcp.layers.short_prefill import (
    ShortPrefill,
    forward_raw,
    is_plain,
    of_last_rows,
    short_prefill_of,
    step_sizes,
)

pytestmark = needs_sglang("0.5.23", "older releases have no hook for it")

# Qwen3-30B-A3B at tp 2 / dcp 2, and DeepSeek-V2-Lite at the same: bytes of bf16.
QWEN3 = StepSizes(16, 2, 4 * 256 * 2, 256, 256, 256)
LATENTS = StepSizes(8, 2, 576 * 2, 576 * 2, 512 * 2, 1088)
SIZES = {"qwen3": QWEN3, "latents": LATENTS}


def make_batch(new: tuple[int, ...] = (3, 1), **fields: Any) -> ForwardBatch:
    """A prefill as SGLang builds it: of `new` tokens, over prefixes of 10, 20, ..."""
    lens, prefix = torch.tensor(new), torch.arange(1, len(new) + 1) * 10
    tokens = sum(new)
    made = dict(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(new),
        input_ids=torch.arange(tokens),
        req_pool_indices=torch.arange(len(new)),
        seq_lens=prefix + lens,
        seq_lens_cpu=prefix + lens,
        seq_lens_sum=int((prefix + lens).sum()),
        out_cache_loc=torch.arange(tokens),
        orig_seq_lens=prefix + lens,
        positions=torch.arange(tokens),
        extend_num_tokens=tokens,
        extend_seq_lens=lens,
        extend_seq_lens_cpu=list(new),
        extend_prefix_lens=prefix,
        extend_prefix_lens_cpu=prefix.tolist(),
        extend_logprob_start_lens_cpu=list(new),
        capture_hidden_mode=CaptureHiddenMode.NULL,
        is_extend_in_batch=True,
        lora_ids=[None] * len(new),
        mm_inputs=[None] * len(new),
        rids=[str(i) for i in range(len(new))],
    )
    return ForwardBatch(**{**made, **fields})


def test_prefills_of_token_ids_are_plain() -> None:
    assert is_plain(make_batch())
    assert is_plain(make_batch(forward_mode=ForwardMode.MIXED))


def test_log_probabilities_of_new_tokens_leave_a_prefill_plain() -> None:
    """SGLang's batch then has ids whose log-probabilities it wants: none."""
    none = torch.zeros(0, dtype=torch.int64)
    asked: dict[str, Any] = dict(return_logprob=True, top_logprobs_nums=[2, 0])
    assert is_plain(make_batch(**asked, extend_input_logprob_token_ids_gpu=none))


SPECIAL = {
    "decode": {"forward_mode": ForwardMode.DECODE},
    "verification": {"forward_mode": ForwardMode.TARGET_VERIFY},
    "draft": {"spec_info": object()},
    "adapter": {"lora_ids": [None, "one"]},
    "image": {"mm_inputs": [None, object()]},
    "embeddings": {"input_embeds": torch.zeros(4, 2)},
    "replicas": {"global_num_tokens_cpu": [4, 0]},
    "scores": {"is_prefill_only": True},
    "hidden": {"capture_hidden_mode": CaptureHiddenMode.LAST},
    "logprobs": {
        "return_logprob": True,
        "extend_logprob_start_lens_cpu": [3, 0],
        "extend_input_logprob_token_ids_gpu": torch.zeros(1, dtype=torch.int64),
    },
    "mrope": {"mrope_positions": torch.zeros(3, 4)},
}


@pytest.mark.parametrize("fields", SPECIAL.values(), ids=SPECIAL.keys())
def test_others_are_not(fields: dict[str, Any]) -> None:
    assert not is_plain(make_batch(**fields))


def test_a_field_of_a_later_release_keeps_a_batch_a_prefill() -> None:
    @dataclasses.dataclass
    class Later(ForwardBatch):
        """A release that knows one more thing about a batch."""

        news: Any = None

    old = make_batch()
    known = {f.name: getattr(old, f.name) for f in dataclasses.fields(old) if f.init}
    assert is_plain(Later(**known))
    assert not is_plain(Later(**known, news=torch.zeros(1)))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_few_tokens_pay_and_many_do_not(sizes: StepSizes) -> None:
    assert pays_as_step(Requests([16], [32768]), sizes)
    assert pays_as_step(Requests([1, 1], [262144, 0]), sizes)
    assert not pays_as_step(Requests([512], [131072]), sizes)
    assert not pays_as_step(Requests([8192], [0]), sizes)
    for prefix in (0, 1, 32768, 1 << 20):
        paying = [
            pays_as_step(Requests([n], [prefix]), sizes) for n in range(1, 999, 7)
        ]
        assert paying == sorted(paying, reverse=True), prefix


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_time_grows_with_every_length(sizes: StepSizes) -> None:
    for new, prefix in ((1, 0), (4, 100), (64, 32768)):
        told = step_seconds(Requests([new], [prefix]), sizes, HOPPER)
        assert told < step_seconds(Requests([new + 1], [prefix]), sizes, HOPPER)
        more = Requests([new, 1], [prefix, 0])
        assert told < step_seconds(more, sizes, HOPPER)
    short, long = (
        step_seconds(Requests([2], [keys]), sizes, HOPPER)
        for keys in (1 << 26, 1 << 27)
    )
    assert long == pytest.approx(2 * short, rel=0.01)


class Graphs:
    """Stands in for SGLang's graphs of decode steps, of up to `most` rows."""

    def __init__(self, most: int) -> None:
        self.most = most

    def can_run_graph(self, step: Any) -> bool:
        return step.batch_size <= self.most


def test_a_step_has_a_graph() -> None:
    runner = SimpleNamespace(decode_cuda_graph_runner=Graphs(4))
    short = ShortPrefill(runner, QWEN3)
    step = short.step_of(make_batch((3, 1)))
    assert step is not None and step.forward_mode.is_decode()
    assert step.seq_lens.tolist() == [11, 12, 13, 21]
    assert step.req_pool_indices.tolist() == [0, 0, 0, 1]
    assert not step.is_extend_in_batch
    assert short.step_of(make_batch((3, 2))) is None
    runner.decode_cuda_graph_runner = None
    assert short.step_of(make_batch((3, 1))) is None


def test_of_each_request_the_last_row_stays() -> None:
    logits = LogitsProcessorOutput(torch.arange(12.0).view(6, 2))
    kept = of_last_rows(logits, make_batch((3, 1, 2))).next_token_logits
    assert kept.tolist() == [[4.0, 5.0], [6.0, 7.0], [10.0, 11.0]]


class Ran:
    """Stands in for `ModelRunner._forward_raw`: logits that tell the row."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, runner: Any, batch: Any, *args: Any) -> Any:
        self.batches.append((batch, *args))
        rows = len(batch.seq_lens)
        logits = LogitsProcessorOutput(torch.arange(float(rows))[:, None])
        return SimpleNamespace(logits_output=logits)


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_the_hook_runs_a_step_and_keeps_the_batch(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_prefill, "find_context", lambda: object() if on else None)
    runner: Any = SimpleNamespace(decode_cuda_graph_runner=Graphs(64))
    runner.attn_backend = SimpleNamespace(short_prefill=ShortPrefill(runner, QWEN3))
    batch, ran = make_batch((3, 1)), Ran()
    before = dataclasses.replace(batch)
    out = forward_raw(ran, runner, batch, None)
    ((seen, *rest),) = ran.batches
    assert rest == [None] and (seen is batch) != on
    kept = out.logits_output.next_token_logits.flatten().tolist()
    assert kept == ([2.0, 3.0] if on else [0.0, 1.0])
    for field in dataclasses.fields(batch):
        assert getattr(batch, field.name) is getattr(before, field.name), field.name


def make_runner(**args: Any) -> Any:
    given = dict(
        attention_backend="fa3",
        speculative_algorithm=None,
        enable_lora=None,
        lora_paths=None,
        enable_deterministic_inference=False,
    )
    model = SimpleNamespace(
        num_attention_heads=32,
        head_dim=128,
        v_head_dim=128,
        get_total_num_kv_heads=lambda: 4,
    )
    return SimpleNamespace(
        server_args=SimpleNamespace(**{**given, **args}),
        model_config=model,
        token_to_kv_pool=SimpleNamespace(dtype=torch.bfloat16),
        dtype=torch.bfloat16,
    )


REFUSED: tuple[dict[str, Any], ...] = (
    {"attention_backend": "triton"},
    {"speculative_algorithm": "NGRAM"},
    {"enable_lora": True},
    {"lora_paths": ["one"]},
    {"enable_deterministic_inference": True},
)


def test_no_prefill_is_a_step_before_it_was_compared_and_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api = SimpleNamespace(resolved=lambda args: args)
    monkeypatch.setattr(short_prefill, "sglang_api", lambda: api)
    monkeypatch.setattr(short_prefill, "is_mla", lambda model: False)
    monkeypatch.setattr(short_prefill, "kv_head_counts", lambda model: (4, 4))
    config = DcpConfig(Layout(2, 1))
    assert short_prefill_of(make_runner(), config) is None
    monkeypatch.setattr(short_prefill, "SERVED", frozenset({"fa3"}))
    assert short_prefill_of(make_runner(), config) is not None
    for args in REFUSED:
        assert short_prefill_of(make_runner(**args), config) is None, args
    assert step_sizes(make_runner(), config) == QWEN3


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
