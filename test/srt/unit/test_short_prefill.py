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
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)

from helpers import short_prefill_door
from helpers.needs_sglang import needs_sglang
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import kv_prefill, short_prefill, short_prefill_rule
from sglang_dcp.layers.backends.fa3 import Fa3Backend
from sglang_dcp.layers.backends.fa3_splits import FULL_TILES
from sglang_dcp.layers.backends.registry import backends
from sglang_dcp.layers.mla import form
from sglang_dcp.layers.mla import sizes as mla_sizes_module
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.layers.mla.form import PrefillBatch
from sglang_dcp.layers.mla.sizes import mla_sizes
from sglang_dcp.layers.prefix import kv_form
from sglang_dcp.layers.prefix.cost import Requests
from sglang_dcp.layers.prefix.decode_step import StepSizes, pays_as_step, step_seconds
from sglang_dcp.layers.prefix.kv_form import KvSizes
from sglang_dcp.layers.prefix.rates import HOPPER
from sglang_dcp.layers.short_prefill import (
    SERVED,
    ShortPrefill,
    Stored,
    forward_raw,
    is_plain,
    of_last_rows,
    short_prefill_of,
)
from sglang_dcp.layers.short_prefill_rule import (
    Rule,
    rule_of,
    step_sizes,
)

pytestmark = needs_sglang("0.5.23", "older releases have no hook for it")

# Qwen3-30B-A3B at tp 2 / dcp 2, and DeepSeek-V2-Lite at the same: bytes of bf16.
QWEN3 = StepSizes(16, 4, 2, 4 * 256 * 2, 256, 256, 256)
LATENTS = StepSizes(8, 1, 2, 576 * 2, 576 * 2, 512 * 2, 1088)
SIZES = {"qwen3": QWEN3, "latents": LATENTS}
# A quarter of the first one, which was timed as the second was, and what their prefills are.
QUARTER = StepSizes(4, 1, 2, 256 * 2, 256, 256, 256)
QUARTER_KV = KvSizes(4, 1, 2, 128, 128, split_below=66)
LATENTS_MLA = MlaSizes(8, 2, 512, 64, 128, 128, split_below=FULL_TILES)
CAPACITY = 128 * 1024


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
    def pays(new: list[int], prefix: list[int], form_s: float = 0.0) -> bool:
        return pays_as_step(Requests(new, prefix), sizes, form_s, eager=False)

    assert pays([16], [32768])
    assert pays([1, 1], [262144, 0])
    assert not pays([512], [131072])
    assert not pays([8192], [0])
    for prefix in (0, 1, 32768, 1 << 20):
        paying = [pays([n], [prefix]) for n in range(1, 999, 7)]
        assert paying == sorted(paying, reverse=True), prefix


@pytest.mark.parametrize("eager", [False, True])
def test_a_step_may_take_as_long_as_all_launches_of_the_prefill(eager: bool) -> None:
    launches = HOPPER.eager_layer_host_s if eager else HOPPER.layer_host_s
    requests = Requests([64], [524288])
    step = step_seconds(requests, LATENTS, HOPPER)
    assert step > launches
    assert pays_as_step(requests, LATENTS, step - launches + 1e-9, eager=eager)
    assert not pays_as_step(requests, LATENTS, step - launches - 1e-9, eager=eager)


def kv_pays(
    new: int, prefix: int, *, gathers: bool = True, eager: bool = False
) -> bool:
    """The rule of Qwen3-30B-A3B/4 at tp 2 / dcp 2, on `fa3`."""
    requests = Requests([new], [prefix])
    form_s = kv_form.added_seconds(requests, QUARTER_KV, gathers=gathers)
    return pays_as_step(requests, QUARTER, form_s, eager=eager)


def latents_pay(new: int, prefix: int) -> bool:
    """The rule of DeepSeek-V2-Lite at tp 2 / dcp 2, whose prefills are eager."""
    requests = Requests([new], [prefix])
    form_s = form.added_seconds(PrefillBatch(requests, CAPACITY), LATENTS_MLA)
    return pays_as_step(requests, LATENTS, form_s, eager=True)


@pytest.mark.parametrize("new", [1, 16, 64])
def test_turns_that_took_less_time_as_steps_are_steps(new: int) -> None:
    assert kv_pays(new, 32768) and latents_pay(new, 32768)
    assert kv_pays(new, 131072)
    if new < 64:
        assert kv_pays(new, 262144) and kv_pays(new, 524288)
        assert latents_pay(new, 131072) and latents_pay(new, 262144)


def test_turns_that_would_take_less_time_by_estimate_are_steps() -> None:
    """As prefills they took 0.11 and 0.08 s more than plain tp."""
    assert latents_pay(64, 131072) and latents_pay(64, 262144)


def test_latents_in_place_count_the_work_of_the_gpu() -> None:
    added = [
        form.added_seconds(
            PrefillBatch(Requests([64], [prefix]), CAPACITY), LATENTS_MLA
        )
        for prefix in (131072, 262144)
    ]
    assert HOPPER.in_place_host_s < added[0] < added[1]


def test_turns_whose_rows_read_more_than_the_form_takes_stay_prefills() -> None:
    # A gather is work that a step saves. In place a long prefix is read once, not by row.
    assert kv_pays(128, 262144) and not kv_pays(256, 262144)
    assert not kv_pays(128, 524288)
    assert not latents_pay(512, 131072)
    # Without a prefix, the launches of plain tp are all that a step saves.
    assert kv_pays(1024, 0) and not kv_pays(8192, 0)


def test_an_eager_prefill_has_more_launches() -> None:
    assert kv_pays(64, 524288, eager=True)
    assert not kv_pays(256, 524288, eager=True)


def test_a_form_adds_nothing_without_a_prefix_or_an_exchange() -> None:
    none = Requests([5, 1], [0, 0])
    assert kv_form.added_seconds(none, QUARTER_KV, gathers=True) == 0.0
    assert form.added_seconds(PrefillBatch(none, CAPACITY), LATENTS_MLA) == 0.0
    alone = QUARTER_KV._replace(dcp_size=1)
    some = Requests([5, 1], [100, 0])
    assert kv_form.added_seconds(some, alone, gathers=False) == 0.0


def test_the_form_that_a_server_takes_counts() -> None:
    """A gather has fewer launches, and more bytes. Too long a prefix is not gathered."""
    turn = Requests([64], [32768])
    added = {
        gathers: kv_form.added_seconds(turn, QUARTER_KV, gathers=gathers)
        for gathers in (False, True)
    }
    assert HOPPER.kv_gather_host_s < added[True] < HOPPER.kv_in_place_host_s
    assert HOPPER.kv_in_place_host_s < added[False] < 1.2 * HOPPER.kv_in_place_host_s
    longer = Requests([64], [524288])
    both = [
        kv_form.added_seconds(longer, QUARTER_KV, gathers=gathers)
        for gathers in (False, True)
    ]
    assert both[0] == both[1] > HOPPER.kv_in_place_host_s


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

    def __init__(self, most: int, fits: bool = True) -> None:
        self.max_bs = most
        self.fits = fits
        self.asked = 0

    def can_run_graph(self, step: Any) -> bool:
        self.asked += 1
        return self.fits and step.batch_size <= self.max_bs


class PrefillGraphs:
    """Stands in for SGLang's graphs of prefills."""

    def __init__(self, fits: bool) -> None:
        self.fits = fits

    def can_run_graph(self, batch: Any) -> bool:
        assert batch.forward_mode.is_extend()
        return self.fits


RULE = Rule(QWEN3, lambda batch: 0.0)


def with_graphs(most: int, *, prefill: bool = True) -> Any:
    return SimpleNamespace(
        decode_cuda_graph_runner=Graphs(most),
        prefill_cuda_graph_runner=PrefillGraphs(prefill),
        model_config=SimpleNamespace(attention_arch=AttentionArch.MHA),
    )


def test_a_step_has_a_graph() -> None:
    runner = with_graphs(4)
    short = ShortPrefill(runner, RULE)
    found = short.step_of(make_batch((3, 1)))
    assert found is not None and found.chains is None
    step = found.batch
    assert step.forward_mode.is_decode()
    assert step.seq_lens.tolist() == [11, 12, 13, 21]
    assert step.req_pool_indices.tolist() == [0, 0, 0, 1]
    assert not step.is_extend_in_batch
    runner.decode_cuda_graph_runner.fits = False
    assert short.step_of(make_batch((3, 1))) is None
    runner.decode_cuda_graph_runner = None
    assert short.step_of(make_batch((3, 1))) is None


def test_rows_beyond_all_graphs_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = with_graphs(4)
    monkeypatch.setattr(short_prefill, "as_prefill_rows", None)
    assert ShortPrefill(runner, RULE).step_of(make_batch((3, 2))) is None
    assert runner.decode_cuda_graph_runner.asked == 0


def test_the_rule_hears_whether_a_prefill_graph_fits() -> None:
    """64 rows on 524,288 positions take longer than the launches between two segments."""
    batch = make_batch((64,), extend_prefix_lens_cpu=[524288])
    for fits in (True, False):
        short = ShortPrefill(
            with_graphs(64, prefill=fits), Rule(QUARTER, lambda b: 0.0)
        )
        assert (short.step_of(batch) is None) == fits
    runner = with_graphs(64)
    runner.prefill_cuda_graph_runner = None
    assert ShortPrefill(runner, Rule(QUARTER, lambda b: 0.0)).step_of(batch)
    # The attention of latents is launched eagerly, whatever fits.
    runner = with_graphs(64)
    runner.model_config.attention_arch = AttentionArch.MLA
    assert ShortPrefill(runner, Rule(QUARTER, lambda b: 0.0)).step_of(batch)


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
    runner = with_graphs(64)
    runner.attn_backend = SimpleNamespace(short_prefill=ShortPrefill(runner, RULE))
    batch, ran = make_batch((3, 1)), Ran()
    before = dataclasses.replace(batch)
    out = forward_raw(ran, runner, batch, None)
    ((seen, *rest),) = ran.batches
    assert rest == [None] and (seen is batch) != on
    kept = out.logits_output.next_token_logits.flatten().tolist()
    assert kept == ([2.0, 3.0] if on else [0.0, 1.0])
    for field in dataclasses.fields(batch):
        assert getattr(batch, field.name) is getattr(before, field.name), field.name


HEADS = dict(head_dim=128, v_head_dim=128, get_total_num_kv_heads=lambda: 4)
MLA = dict(
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
)


def make_runner(
    *, mla: bool = False, stored: torch.dtype = torch.bfloat16, **args: Any
) -> Any:
    given = dict(
        attention_backend="fa3",
        speculative_algorithm=None,
        enable_lora=None,
        lora_paths=None,
        enable_deterministic_inference=False,
    )
    heads: dict[str, Any] = dict(num_attention_heads=16, **MLA)
    if not mla:
        heads = dict(num_attention_heads=32, **HEADS)
    return SimpleNamespace(
        device="cuda",
        server_args=SimpleNamespace(**{**given, **args}),
        model_config=SimpleNamespace(is_mla=mla, **heads),
        token_to_kv_pool=SimpleNamespace(dtype=stored),
        dtype=torch.bfloat16,
    )


CONFIG = DcpConfig(Layout(2, 1))
REFUSED: tuple[dict[str, Any], ...] = (
    {"attention_backend": "triton"},
    {"attention_backend": "flashinfer"},
    {"stored": torch.float8_e4m3fn},
    {"speculative_algorithm": "NGRAM"},
    {"enable_lora": True},
    {"lora_paths": ["one"]},
    {"enable_deterministic_inference": True},
)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code read `make_runner`'s models."""
    api = SimpleNamespace(resolved=lambda args: args)
    monkeypatch.setattr(short_prefill, "sglang_version", lambda: "0.5.23")
    monkeypatch.delenv(short_prefill.SWITCH, raising=False)
    for module in (short_prefill, kv_prefill, mla_sizes_module):
        monkeypatch.setattr(module, "sglang_api", lambda: api)
    for module in (short_prefill, short_prefill_rule, kv_prefill):
        monkeypatch.setattr(module, "is_mla", lambda model: model.is_mla)
    for module in (short_prefill_rule, kv_prefill):
        monkeypatch.setattr(module, "kv_head_counts", lambda model: (4, 4))


@pytest.mark.usefixtures("models")
def test_steps_are_served_where_they_were_compared_and_timed() -> None:
    assert short_prefill_of(make_runner(), CONFIG) is not None
    for args in REFUSED:
        assert short_prefill_of(make_runner(**args), CONFIG) is None, args
    assert SERVED == {("fa3", Stored.KV_HEADS), ("fa3", Stored.LATENTS)}


@pytest.mark.usefixtures("models")
def test_earlier_releases_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_prefill, "sglang_version", lambda: "0.5.16")
    assert short_prefill_of(make_runner(), CONFIG) is None


@pytest.mark.usefixtures("models")
def test_a_variable_turns_steps_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, served in (("0", False), ("1", True)):
        monkeypatch.setenv(short_prefill.SWITCH, value)
        assert (short_prefill_of(make_runner(), CONFIG) is not None) == served


@pytest.mark.usefixtures("models")
def test_the_door_opens_what_was_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(short_prefill.SWITCH, "0")
    for name in ("SERVED", "MOST_EAGER_ROWS"):
        monkeypatch.setattr(short_prefill, name, getattr(short_prefill, name))
    monkeypatch.setattr(ShortPrefill, "step_of", ShortPrefill.step_of)
    short_prefill_door.open_door()
    for mla in (False, True):
        for name in backends(mla):
            runner = make_runner(attention_backend=name, mla=mla)
            assert short_prefill_of(runner, CONFIG) is not None, (name, mla)
    fp8 = make_runner(attention_backend="flashinfer", stored=torch.float8_e4m3fn)
    assert short_prefill_of(fp8, CONFIG) is not None


@pytest.mark.usefixtures("models")
def test_the_rule_of_a_runner_has_its_sizes() -> None:
    heads, latents = make_runner(), make_runner(mla=True)
    assert step_sizes(heads, CONFIG) == QWEN3
    assert step_sizes(latents, CONFIG) == LATENTS
    assert mla_sizes(latents, CONFIG) == LATENTS_MLA
    fixed = make_runner(mla=True, enable_deterministic_inference=True)
    assert mla_sizes(fixed, CONFIG) == LATENTS_MLA._replace(split_below=0)
    batch = make_batch((64,), extend_prefix_lens_cpu=[131072])
    turn = Requests([64], [131072])
    told = form.added_seconds(PrefillBatch(turn, CAPACITY), LATENTS_MLA)
    assert rule_of(latents, CONFIG).added(batch) == told
    sizes = KvSizes(16, 4, 2, 128, 128, split_below=Fa3Backend.splits_ragged_below)
    # fp8 is never gathered.
    fp8 = make_runner(stored=torch.float8_e4m3fn)
    for runner, itemsize in ((heads, 2), (fp8, 1)):
        told = kv_form.added_seconds(
            turn, sizes._replace(itemsize=itemsize), gathers=runner is heads
        )
        assert rule_of(runner, CONFIG).added(batch) == told


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
