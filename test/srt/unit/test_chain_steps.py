"""Short prefills of one request as chains: which are, at which sizes, in which graphs.

That a captured chain attends right is in `test_backends_mla.py`, and on GPUs in
`test_backends_gpu.py`. That whole servers answer as tp 1 is in
`server/test_server_equality.py`.
"""

from __future__ import annotations

import csv
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from helpers.needs_sglang import needs_sglang
from sglang_dcp.layers import attention, chain_steps, short_prefill
from sglang_dcp.layers.chain_steps import CHAIN, WIDTHS, ChainSteps, capture_size
from sglang_dcp.layers.decode_rows import as_chains, as_one_chain, as_prefill_rows
from sglang_dcp.layers.prefix.cost import Requests, exchange_seconds
from sglang_dcp.layers.prefix.decode_step import (
    StepSizes,
    chain_is_faster,
    chain_seconds,
    pays_as_step,
    step_seconds,
)
from sglang_dcp.layers.prefix.rates import HOPPER
from sglang_dcp.layers.short_prefill import ShortPrefill, forward_raw
from sglang_dcp.layers.short_prefill_rule import Rule

pytestmark = needs_sglang("0.5.23", "older releases have no hook for it")

# Qwen3-30B-A3B/4 and DeepSeek-V2-Lite at tp 2 / dcp 2.
QUARTER = StepSizes(4, 1, 2, 256 * 2, 256, 256, 256)
LATENTS = StepSizes(8, 1, 2, 576 * 2, 576 * 2, 512 * 2, 1088)
MEASURED = {"Qwen3-30B-A3B/4": QUARTER, "DeepSeek-V2-Lite": LATENTS}
FORMS = ("rows", "folded")
RESULTS = Path(__file__).resolve().parents[3] / "benchmark" / "results"
LONG = 1 << 30


def exchange_of(width: int, sizes: StepSizes) -> float:
    """Seconds of the exchange of a step with so many tokens."""
    rows = width * sizes.heads
    numbers = sizes.dcp_size, sizes.query_bytes, sizes.out_bytes
    return exchange_seconds(rows, *numbers, HOPPER)


def measured() -> list[dict[str, str]]:
    """Rows of `bench_verification.py`: microseconds of kernels on one H200."""
    with (RESULTS / "2026-11-30-chains-h200.csv").open() as lines:
        return list(csv.DictReader(lines))


def turn(new: int, prefix: int = LONG, **fields: Any) -> ForwardBatch:
    """A prefill of one request."""
    ends = torch.tensor([prefix + new])
    made: dict[str, Any] = dict(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.arange(new),
        req_pool_indices=torch.tensor([7]),
        seq_lens=ends,
        seq_lens_cpu=ends.clone(),
        seq_lens_sum=prefix + new,
        out_cache_loc=torch.arange(new) + 50,
        orig_seq_lens=ends,
        positions=torch.arange(new) + prefix,
        extend_num_tokens=new,
        extend_seq_lens=torch.tensor([new]),
        extend_seq_lens_cpu=[new],
        extend_prefix_lens=torch.tensor([prefix]),
        extend_prefix_lens_cpu=[prefix],
    )
    return ForwardBatch(**{**made, **fields})


def padded(rows: ForwardBatch, size: int) -> Any:
    """Rows as SGLang's runner replays them: of row 0 and with one token, where it pads."""
    more = size - rows.batch_size
    pad = torch.nn.functional.pad
    return SimpleNamespace(
        forward_mode=rows.forward_mode,
        spec_info=None,
        batch_size=size,
        req_pool_indices=pad(rows.req_pool_indices, (0, more)),
        seq_lens=pad(rows.seq_lens, (0, more), value=1),
        seq_lens_cpu=pad(rows.seq_lens_cpu, (0, more), value=1),
        out_cache_loc=pad(rows.out_cache_loc, (0, more)),
    )


@pytest.mark.parametrize("size", [3, 8], ids=["full", "padded"])
def test_rows_of_a_request_become_a_chain_over_its_prefix(size: int) -> None:
    rows = padded(as_prefill_rows(turn(3, prefix=10)), size)
    step, width = as_chains(as_one_chain(rows))
    assert step.forward_mode.is_decode() and width == size and step.batch_size == 1
    assert step.seq_lens.tolist() == step.seq_lens_cpu.tolist() == [10]
    assert step.req_pool_indices.tolist() == [7]
    assert step.out_cache_loc.tolist() == [50, 51, 52] + [0] * (size - 3)
    assert rows.batch_size == size and rows.spec_info is None


@pytest.mark.parametrize("sizes", [QUARTER, LATENTS], ids=["heads", "latents"])
def test_a_chain_reads_the_prefix_once(sizes: StepSizes) -> None:
    of_rows = step_seconds(Requests([64], [524288]), sizes, HOPPER)
    of_chain = chain_seconds(64, 524288, sizes, HOPPER)
    assert of_chain < of_rows and chain_is_faster(64, 524288, 64, sizes)
    # It multiplies as much, so twice the tokens take more.
    assert of_chain < chain_seconds(128, 524288, sizes, HOPPER)
    assert not chain_is_faster(2, 100, 2, sizes)
    own = chain_seconds(2, 100, sizes, HOPPER) - HOPPER.chain_s
    few = step_seconds(Requests([2], [100]), sizes, HOPPER)
    assert own == pytest.approx(few, rel=0.05)


def test_tokens_that_fill_a_chain_are_multiplied_too() -> None:
    assert chain_is_faster(5, 131072, 8, LATENTS)
    assert not chain_is_faster(5, 131072, 64, LATENTS)


@pytest.mark.parametrize("row", measured(), ids="{model}-{context}-{width}".format_map)
def test_estimates_agree_with_kernels_that_were_timed(row: dict[str, str]) -> None:
    """Attention of one rank, which the estimates tell with tokens and exchange besides.

    What a call takes besides its keys is no part of an estimate: up to 45 us.
    """
    sizes = MEASURED[row["model"]]
    width, context = int(row["width"]), int(row["context"])
    turn = Requests([width], [context])
    rest = width * HOPPER.layer_token_s + exchange_of(width, sizes)
    told = {
        "rows": step_seconds(turn, sizes, HOPPER) - rest,
        "chain": chain_seconds(width, context, sizes, HOPPER) - rest,
    }
    timed = {
        "rows": float(row["rows"]),
        "chain": float(row["folded"]) + float(row["chain"]),
    }
    for name, microseconds in timed.items():
        assert told[name] * 1e6 == pytest.approx(microseconds, rel=0.2, abs=40), name
    if abs(timed["rows"] - timed["chain"]) > 2:
        faster = timed["chain"] < timed["rows"]
        assert chain_is_faster(width, context, width, sizes) == faster


@pytest.mark.parametrize("model", MEASURED)
def test_rates_of_long_prefixes_are_those_of_kernels(model: str) -> None:
    """By differences between two prefixes, where what a call takes besides falls out."""
    sizes = MEASURED[model]
    times = {
        (int(row["width"]), int(row["context"])): row
        for row in measured()
        if row["model"] == model
    }
    for width in (32, 64):
        short, long = (times[width, context] for context in (262144, 524288))
        rows, chain = (float(long[form]) - float(short[form]) for form in FORMS)
        one, two = (Requests([width], [context]) for context in (262144, 524288))
        told = step_seconds(two, sizes, HOPPER) - step_seconds(one, sizes, HOPPER)
        assert told * 1e6 == pytest.approx(rows, rel=0.12)
        told = chain_seconds(width, 524288, sizes, HOPPER)
        told -= chain_seconds(width, 262144, sizes, HOPPER)
        assert told * 1e6 == pytest.approx(chain, rel=0.12)


def test_a_chain_among_itself_takes_as_long_as_between_both_models() -> None:
    of_chain = [float(row["chain"]) for row in measured()]
    assert min(of_chain) < HOPPER.chain_s * 1e6 < max(of_chain)


def test_each_kv_head_has_tiles_of_its_own() -> None:
    """So four K/V heads with four times the heads and bytes take four times as long."""
    four = QUARTER._replace(heads=16, kv_heads=4, key_bytes=4 * QUARTER.key_bytes)

    def of_attention(sizes: StepSizes, width: int) -> list[float]:
        free = HOPPER._replace(layer_token_s=0.0, chain_s=0.0)
        rows = step_seconds(Requests([width], [524288]), sizes, free)
        chain = chain_seconds(width, 524288, sizes, free)
        return [seconds - exchange_of(width, sizes) for seconds in (rows, chain)]

    for width in (1, 12, 64):
        one = of_attention(QUARTER, width)
        assert of_attention(four, width) == pytest.approx([4 * s for s in one])


@pytest.mark.parametrize("faster", [True, False])
def test_a_backend_has_chains_where_some_are_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def has_chains(context: int) -> bool:
        asked.append(context)
        return faster

    rule = SimpleNamespace(has_chains=has_chains)
    short = SimpleNamespace(rule=rule, chains=None)
    monkeypatch.setattr(attention, "short_prefill_of", lambda runner, config: short)
    built: Any = object.__new__(attention.DcpAttentionBackend)
    built.chains = None
    runner = SimpleNamespace(model_config=SimpleNamespace(context_len=4096))
    built._add_short_prefills(None, runner, None)
    assert built.short_prefill is short and asked == [4096]
    assert built.chains is short.chains and (built.chains is not None) == faster


def test_many_heads_over_latents_are_never_faster_as_a_chain() -> None:
    many = LATENTS._replace(heads=64)
    for width in WIDTHS:
        assert not chain_is_faster(width, 1 << 20, width, many)
    assert not Rule(many, lambda batch: 0.0).has_chains(1 << 20)


@pytest.mark.parametrize("sizes", [QUARTER, LATENTS], ids=["heads", "latents"])
def test_chains_are_made_where_requests_may_be_long(sizes: StepSizes) -> None:
    rule = Rule(sizes, lambda batch: 0.0)
    assert rule.has_chains(32768) and not rule.has_chains(100)


def test_what_does_not_pay_as_rows_may_pay_as_a_chain() -> None:
    long = Requests([64], [524288])
    paying = [
        pays_as_step(long, QUARTER, 0.0, eager=False, chain=chain)
        for chain in (None, 64, 512)
    ]
    assert paying == [False, True, False]


class Backend:
    """Stands in for the backend of a chain."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.inits: list[tuple[int, int]] = []

    def init_cuda_graph_state(self, *sizes: int) -> None:
        self.inits.append(sizes)  # type: ignore[arg-type]


def test_backends_are_built_once_and_for_sizes_that_a_runner_has() -> None:
    built: list[int] = []

    def make(width: int) -> Any:
        built.append(width)
        return Backend(width)

    chains = ChainSteps(make)
    chains.init_graphs(24)
    assert built == [8, 12, 16, 24]
    one: Any = chains.backend_of(16)
    assert one.inits == [(1, 16)] and len(built) == 4


def test_steps_are_chains_only_while_one_runs() -> None:
    chains = ChainSteps(Backend)  # type: ignore[arg-type]
    assert chains.variant(None, 8) is None
    with chains.running():
        assert chains.variant(None, 8) == CHAIN
    with pytest.raises(KeyError), chains.running():
        raise KeyError
    assert chains.variant(None, 8) is None


class Captures:
    """Stands in for SGLang's runner, which captures each of its sizes."""

    def __init__(self, chains: Any, **more: Any) -> None:
        self.attn_backend = SimpleNamespace(chains=chains)
        self.attention_graph_variants: Any = None
        self._metadata_glue: Any = None
        self.captured: list[tuple[Any, ...]] = []
        self.__dict__.update(more)

    def _resolve_attention_variant(self, batch: Any, size: int) -> Any:
        return "as SGLang says"

    def capture(self, *sizes: int) -> None:
        """As SGLang calls, by place, and some of its runners by name."""
        for size in sizes:
            rest = ("forward", 3, "lora", None) if size > 8 else ("forward",)
            named = {} if size > 8 else dict(stream_idx=3, variant_label="lora")
            found = capture_size(Captures._capture, self, size, *rest, **named)
            assert found == size

    def _capture(
        self,
        size: int,
        forward: str,
        stream_idx: Any = None,
        variant_label: Any = None,
        attention_variant: Any = None,
    ) -> int:
        chains = getattr(self.attn_backend, "chains", None)
        on = bool(chains and chains.on)
        given = size, forward, stream_idx, variant_label, attention_variant
        self.captured.append((*given, on))
        return size


def test_chains_are_captured_at_their_sizes_beside_the_rows() -> None:
    chains = ChainSteps(Backend)  # type: ignore[arg-type]
    graphs = Captures(chains)
    graphs.capture(64, 20, 8, 4)
    of = "forward", 3, "lora"
    assert graphs.captured == [
        (64, *of, None, False),
        (64, *of, CHAIN, True),
        (20, *of, None, False),
        (8, *of, None, False),
        (8, *of, CHAIN, True),
        (4, *of, None, False),
    ]
    captured = [size for size in (4, 8, 20, 64) if chains.serves(size, captured=True)]
    assert captured == [8, 64]
    assert chains.serves(12, captured=False) and not chains.serves(20, captured=False)
    assert graphs._resolve_attention_variant(None, 8) is None
    with chains.running():
        assert graphs._resolve_attention_variant(None, 8) == CHAIN


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_backend": SimpleNamespace()},
        {"attn_backend": SimpleNamespace(chains=None)},
        {"_metadata_glue": object()},
        {"attention_graph_variants": object()},
    ],
    ids=["another backend", "no chains", "glue", "variants"],
)
def test_other_runners_capture_as_sglang_does(fields: dict[str, Any]) -> None:
    chains = ChainSteps(Backend)  # type: ignore[arg-type]
    graphs = Captures(chains, **fields)
    graphs.capture(8)
    assert graphs.captured == [(8, "forward", 3, "lora", None, False)]
    assert graphs._resolve_attention_variant(None, 8) == "as SGLang says"
    assert not chains.serves(8, captured=True)


def test_sglang_names_the_variant_as_the_hook_does() -> None:
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as sglang

    theirs = inspect.signature(sglang.DecodeCudaGraphRunner.capture_one_shape)
    assert "attention_variant" in theirs.parameters


class Decodes:
    """Stands in for SGLang's captured decode steps."""

    capture_bs = (1, 2, 4, 8, 12, 24, 64)
    max_bs = 64

    def can_run_graph(self, step: Any) -> bool:
        return True


RULE = Rule(QUARTER, lambda batch: float("inf"))


def short_of(*captured: int, graphs: Any = Decodes()) -> ShortPrefill:
    runner = SimpleNamespace(
        decode_cuda_graph_runner=graphs, prefill_cuda_graph_runner=None
    )
    short = ShortPrefill(runner, RULE)
    short.chains = ChainSteps(Backend)  # type: ignore[arg-type]
    for size in captured:
        short.chains.capture(size, lambda: None)
    return short


def chain_of(short: ShortPrefill, batch: ForwardBatch) -> bool:
    step = short.step_of(batch)
    assert step is not None
    assert step.chains in (None, short.chains)
    return step.chains is not None


def test_a_request_alone_is_a_chain_where_its_graph_is_captured() -> None:
    short = short_of(8, 24)
    # SGLang pads to 8, 12, 24 and 64 rows.
    found = {new: chain_of(short, turn(new)) for new in (4, 5, 8, 9, 13, 24, 25)}
    want = {4: False, 5: True, 8: True, 9: False, 13: True, 24: True, 25: False}
    assert found == want
    # No graph is as large, so nothing is a step.
    assert short.step_of(turn(65)) is None


def test_several_requests_are_rows() -> None:
    lens = torch.tensor([3, 5])
    both = turn(
        8,
        batch_size=2,
        req_pool_indices=torch.tensor([1, 2]),
        seq_lens=LONG + lens,
        seq_lens_cpu=LONG + lens,
        extend_seq_lens=lens,
        extend_seq_lens_cpu=lens.tolist(),
        extend_prefix_lens=torch.tensor([LONG, LONG]),
        extend_prefix_lens_cpu=[LONG, LONG],
    )
    assert not chain_of(short_of(8), both)


def test_rows_stay_where_a_chain_is_not_faster() -> None:
    assert not chain_of(short_of(8), turn(8, prefix=0))
    assert chain_of(short_of(8), turn(8))


def test_without_graphs_a_chain_has_one_of_its_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(short_prefill, "MOST_EAGER_ROWS", 64)
    monkeypatch.setattr(chain_steps, "WIDTHS", (5,))
    short = short_of(graphs=None)
    assert chain_of(short, turn(5)) and not chain_of(short, turn(8))


@pytest.mark.parametrize("new", [8, 4], ids=["chain", "rows"])
def test_the_hook_runs_a_chain_as_one(
    new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short_prefill, "find_context", object)
    monkeypatch.setattr(short_prefill, "of_last_rows", lambda logits, batch: logits)
    short = short_of(8)
    assert short.chains is not None
    chains, seen = short.chains, []

    def ran(runner: Any, step: Any) -> Any:
        seen.append((step.batch_size, chains.on))
        return SimpleNamespace(logits_output=None)

    runner = SimpleNamespace(attn_backend=SimpleNamespace(short_prefill=short))
    forward_raw(ran, runner, turn(new))
    assert seen == [(new, new == 8)] and not chains.on


def test_sizes_are_those_that_sglang_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import cuda_graph_hook

    monkeypatch.setattr(cuda_graph_hook, "resolving_view", lambda args: args)
    args = SimpleNamespace(disable_cuda_graph_padding=False, speculative_algorithm=None)
    sizes = cuda_graph_hook.generate_decode_cuda_graph_batch_sizes(args, 128)
    assert list(WIDTHS) == [size for size in sizes if WIDTHS[0] <= size <= 64]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
