"""What `benchmark/bench_decode.py` starts and where its requests lie, without a GPU.

Only this file sees that SGLang's own DCP, which needs GPUs, would be given arguments, slots and
pool sizes of the kind that it expects, and that the stand-in model stands for what it says.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import bench_decode
import bench_serving
import decode_engine
import decode_peer
from decode_layouts import Layout, default_layouts
from decode_memory import weight_bytes
from decode_models import MODELS, default_model, kv_copies, write_model
from decode_ranks import received
from decode_report import step_table
from helpers.gloo_ranks import python_path, run_python
from live_servers import server_flags

BENCHMARK = Path(__file__).parents[3] / "benchmark"

# Own arguments of SGLang, as if this were a GPU machine, in a process without the package.
UPSTREAM_ARGS = """
import sys
from contextlib import ExitStack
from unittest.mock import patch
import argparse, bench_decode, bench_release, decode_runner
from pathlib import Path
from sglang.srt.plugins import load_plugins
load_plugins()
options = bench_decode.parse(
    ["x.csv", "--model", sys.argv[1], "--tp", "2", "--device", "cuda", "--layouts", "upstream:2"]
)
options.device = "cpu"
[layout] = options.layouts
with ExitStack() as stack:
    if not bench_release.publishes():
        stack.enter_context(patch("sglang.srt.server_args.is_cuda", return_value=True))
    args = decode_runner.server_args(options, layout, Path(sys.argv[2]))
found = bench_release.resolved(args)
print("got", type(args).__name__, found.dcp_size, found.page_size, found.attention_backend)
if bench_release.publishes():
    from sglang.srt import runtime_context
    ranks = runtime_context.SpawnRanks(world_rank=1, gpu_id=1)
    runtime_context.publish(args, role="scheduler", ranks=ranks)
    state = runtime_context.get_parallel()
    gpu = runtime_context.get_device().gpu_id
else:
    state = bench_release.parallel_state(args, 1)
    gpu = state.gpu_id
print("got", state.dcp_size, state.tp_rank, state.attn_tp_rank, gpu)
print("got", found.max_running_requests, "sglang_dcp" in sys.modules)
"""


def parsed(*words: str, device: str = "cuda") -> argparse.Namespace:
    return bench_decode.parse(["x.csv", "--device", device, *words])


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("tp@flashinfer", ("tp@flashinfer", 1, "-", "-", "flashinfer")),
        ("2:a2a", ("2:a2a", 2, "a2a", "gathered", "fa3")),
        ("8:symm_a2a:q", ("8:symm_a2a:q", 8, "symm_a2a", "replicated", "fa3")),
        ("2:a2a:q@triton", ("2:a2a:q@triton", 2, "a2a", "replicated", "triton")),
        ("upstream:2", ("upstream:2@triton", 2, "upstream", "gathered", "triton")),
    ],
)
def test_a_layout_by_name(text: str, wanted: tuple[Any, ...]) -> None:
    assert Layout.parse(text).resolved("Qwen2.5-3B", "fa3") == wanted


def test_latents_of_the_peer_are_read_by_flashinfer() -> None:
    layout = Layout.parse("upstream:2")
    assert layout.resolved("DeepSeek-V2-Lite", "fa3").name == "upstream:2@flashinfer"
    # No word where it is the run's own.
    assert layout.resolved("DeepSeek-V2-Lite", "flashinfer").name == "upstream:2"


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:a2a:r", "1:a2a", "upstream:2:r", "upstream:1", "2:a2a@", "x:a2a"],
)
def test_no_layout(text: str) -> None:
    with pytest.raises(ValueError):
        Layout.parse(text)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_default_layouts_can_start(model: str, tp: int) -> None:
    if MODELS[model]["num_attention_heads"] % tp:
        pytest.skip("tp does not divide the heads")
    options = parsed("--model", model, "--tp", str(tp))
    names = [layout.name for layout in options.layouts]
    copies = kv_copies(model, tp)
    assert names[0] == f"{max(2, copies)}:symm_a2a:q"
    assert len(set(names)) == len(names)
    assert any(layout.is_upstream for layout in options.layouts) == (copies > 1)
    assert all(layout.attention for layout in (options.plain, *options.layouts))


def test_on_a_cpu_nothing_that_needs_a_gpu() -> None:
    options = parsed("--model", "tiny", "--tp", "2", device="cpu")
    assert [layout.name for layout in options.layouts] == ["2:a2a:q", "2:ag_rs"]
    assert options.plain.attention == "torch_native"


@pytest.mark.parametrize(
    "words, said",
    [
        ("--model Llama-3.1-8B --tp 8 --layouts upstream:2", "exceed tp"),
        ("--model Qwen2.5-3B --tp 4 --layouts upstream:2@fa3", "made for triton"),
        ("--model tiny --tp 2 --device cpu --layouts upstream:2", "on a CPU"),
        ("--model Qwen2.5-3B --tp 4 --layouts upstream:2:q", "replicates no Q"),
    ],
)
def test_the_peer_is_not_timed_where_it_computes_nonsense(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parsed(*words.split())
    assert said in capsys.readouterr().err


def test_serving_starts_the_first_layout_alone() -> None:
    words = ["x.jsonl", "--device", "cuda", "--tp", "2"]
    options = bench_serving.parse(words)
    assert [layout.name for layout in options.layouts] == ["2:symm_a2a:q"]
    [upstream] = bench_serving.parse([*words, "--layouts", "upstream:2"]).layouts
    flags = " ".join(server_flags(options, upstream))
    assert "--dcp-size 2" in flags and "--attention-backend triton" in flags
    assert "comm-backend" not in flags and "replicate" not in flags


def test_two_ranks_of_the_stand_in_are_two_of_eight() -> None:
    whole, part = MODELS["Qwen3-30B-A3B"], MODELS[default_model(2)]
    cut = {name for name in whole if whole[name] != part[name]}
    assert cut == {
        "num_attention_heads",
        "num_key_value_heads",
        "moe_intermediate_size",
    }
    for name in ("num_attention_heads", "moe_intermediate_size"):
        assert part[name] // 2 == whole[name] // 8
    assert kv_copies(default_model(2), 2) == kv_copies("Qwen3-30B-A3B", 8) == 2
    # Query and K/V heads of a DCP group of two.
    assert part["num_attention_heads"] == whole["num_attention_heads"] // 4
    assert part["num_key_value_heads"] == whole["num_key_value_heads"] // 4


@pytest.mark.parametrize(
    "model, backend",
    [("Qwen3-30B-A3B/4", "triton"), ("DeepSeek-V2-Lite", "flashinfer")],
)
def test_arguments_of_the_peer(model: str, backend: str, tmp_path: Path) -> None:
    write_model(tmp_path, model, 4096)
    script = tmp_path / "script.py"
    script.write_text(UPSTREAM_ARGS)
    path = python_path(BENCHMARK)
    done = run_python(
        *(str(script), model, str(tmp_path)), PYTHONPATH=path, SGLANG_PLUGINS="none"
    )
    got = [line for line in done.stdout.splitlines() if line.startswith("got")]
    assert got == [
        f"got ServerArgs 2 64 {backend}",
        "got 2 1 1 1",
        "got 32 False",
    ], done.stderr[-4000:]


PAGE, TOKENS, DCP_SIZE = 16, 4096, 2


def engine_over(tokens: int, page: int, rank_tokens: int) -> decode_engine.Engine:
    """An engine whose allocator is SGLang's, over `tokens` slots in pages of `page`."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

    pool: Any = SimpleNamespace(
        size=rank_tokens,
        dtype=torch.bfloat16,
        k_buffer=[torch.zeros(rank_tokens + PAGE, 1, 8, dtype=torch.bfloat16)],
    )
    allocator = PagedTokenToKVPoolAllocator(
        tokens, page, torch.bfloat16, "cpu", pool, need_sort=False
    )
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=SimpleNamespace(
            req_to_token=torch.zeros(9, 2048, dtype=torch.int32)
        ),
        # One rank's page in SGLang's own DCP, a logical one beside this package.
        server_args=SimpleNamespace(page_size=PAGE),
    )
    with patch.object(decode_engine, "model_runner", lambda *_: (runner, 7)):
        return decode_engine.Engine(SimpleNamespace(device="cpu"), 0, 0, 100)


@pytest.mark.parametrize("scattered", (True, False))
@pytest.mark.parametrize("batch, length", [(1, 1999), (3, 1001), (8, 7)])
def test_slots_of_the_peer_are_logical(
    batch: int, length: int, scattered: bool
) -> None:
    # As `kv_cache_configurator.py` widens them.
    engine = engine_over(TOKENS * DCP_SIZE, PAGE * DCP_SIZE, TOKENS)
    assert engine._place(batch, length, scattered=scattered) is None
    slots = engine.runner.req_to_token_pool.req_to_token[1 : batch + 1, :length]
    # The owner rule of SGLang's triton and FlashInfer index kernels, and their rows.
    assert (slots % DCP_SIZE == torch.arange(length) % DCP_SIZE).all()
    assert len(slots.unique()) == slots.numel()
    assert slots.min() >= PAGE * DCP_SIZE and slots.max() // DCP_SIZE < TOKENS + PAGE
    starts = slots[:, :: PAGE * DCP_SIZE]
    assert (starts % (PAGE * DCP_SIZE) == 0).all()
    in_order = bool((starts.diff() > 0).all())
    assert in_order != scattered or starts.shape[1] < 3


def test_what_does_not_fit_is_counted_in_logical_tokens() -> None:
    engine = engine_over(TOKENS * DCP_SIZE, PAGE * DCP_SIZE, TOKENS)
    assert engine._place(4, 2047, scattered=True) is None
    assert engine._place(5, 1700, scattered=True) == 5 * 1728
    row = engine.measure(Layout.parse("upstream:2"), 5, 1700 - 11, 1)
    assert (row.pool_tokens, row.pool_tokens_rank) == (TOKENS * DCP_SIZE, TOKENS)
    assert row.weight_bytes == 7
    assert row.status == "does not fit (needs 8640, pool 8192)"


def test_every_row_of_a_rank_is_filled() -> None:
    engine = engine_over(TOKENS * DCP_SIZE, PAGE * DCP_SIZE, TOKENS)
    [rows] = engine.runner.token_to_kv_pool.k_buffer
    assert rows.ne(0).any(-1).all()


def test_messages_go_through_the_process_of_the_peer() -> None:
    receiver, sender = mp.Pipe(duplex=False)
    closed = []

    def messages() -> Iterator[Any]:
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    decode_peer.forward(messages(), sender)  # type: ignore[arg-type]
    assert list(received(receiver, Layout(), [])) == ["a", "b"] and closed == [True]


def test_a_peer_that_no_one_hears_ends_its_ranks() -> None:
    receiver, sender = mp.Pipe(duplex=False)
    receiver.close()
    closed: list[bool] = []

    def messages() -> Iterator[Any]:
        try:
            yield "a"
        finally:
            closed.append(True)

    every = messages()
    with pytest.raises(BrokenPipeError):
        decode_peer.forward(every, sender)  # type: ignore[arg-type]
    # Now, not when the generator happens to be collected.
    assert closed == [True] and every is not None


def test_a_peer_that_ends_early_is_an_error() -> None:
    receiver, sender = mp.Pipe(duplex=False)
    sender.send("a")
    sender.close()
    every = received(receiver, Layout.parse("upstream:2"), [])
    assert next(every) == "a"
    with pytest.raises(RuntimeError, match="upstream:2"):
        next(every)


def test_weights_are_counted_once_and_without_the_rotary_tables() -> None:
    # Bytes need no memory on this device. Other tests may have left tensors there.
    others = weight_bytes(torch.nn.Module(), "meta")
    model = torch.nn.Linear(4, 3, bias=False, device="meta", dtype=torch.bfloat16)
    rotary = torch.nn.Module()
    rotary.register_buffer("cos_sin_cache", torch.empty(1000, device="meta"))
    model.rotary = rotary
    absorbed = torch.empty(6, 5, device="meta", dtype=torch.float8_e4m3fn)
    # As a rank's own `w_kc`, which is a view of that of all ranks.
    model.w_kc = absorbed[:3]
    assert weight_bytes(model, "meta") - others == 4 * 3 * 2 + 6 * 5


def test_the_table_tells_the_weights_of_a_rank() -> None:
    record = {"context": "8", "batch": "1", "name": "tp", "median_ms": "1.5"}
    record |= {"p95_ms": "2.5", "pool_tokens": "1000"}
    rows = [["context", "batch", "tp"], ["8", "1", "**1.50** (2.50)"]]
    rows += [["KV tokens", "", "1,000"]]
    # As files before the column was there.
    assert step_table([record]) == rows
    weights = ["weights, GB", "", "2.346"]
    assert step_table([{**record, "weight_bytes": "2345678901"}]) == [*rows, weights]


def test_default_layouts_of_one_rank() -> None:
    assert default_layouts("tiny", 1, "cuda") == []


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
