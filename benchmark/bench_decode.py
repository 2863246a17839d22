"""Time of a decode step of whole engines over context length and batch size.

    python benchmark/bench_decode.py results.csv --model Qwen3-30B-A3B --tp 8 \\
        --layouts 2:a2a 2:a2a:q 2:ag_rs 8:a2a:q --contexts 32768 131072 --batches 1 8 32

Every layout gets one engine after the other: `tp` (no DCP) always first, then those of
`--layouts`, written KVP:COMM or, with the Q projection replicated, KVP:COMM:q. An engine
is SGLang's model runner, one process a GPU, with dummy weights, as a scheduler builds it
(plugins, seams, pools, CUDA graphs). The KV pool is filled with random keys and values
and requests get randomly scattered pages of it, so that nothing is prefilled.

A step is `ModelRunner.forward` of one token a request, replayed as a CUDA graph (else the
run ends), with the same small tensors made before it as the scheduler makes. Steps follow
each other without waiting for the host, as under the overlap scheduler; a step's time is
between CUDA events, the slowest rank counts, the table holds median and 95th percentile.
`host_ms` is the least that a step took the slowest host: a step can be no shorter.

Not measured: scheduling, sampling, tokenizer and HTTP; prefill; requests of mixed length;
real weights, whose router may load experts less evenly; a tuned fused-MoE configuration
where the installation has none for this GPU (the same for every layout).
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from decode_models import (
    MODELS,
    Layout,
    Row,
    model_runner,
    run_layout,
    vocab_size,
    write_model,
)

WARM_STEPS = 10
PROFILED_STEPS = 5
PROFILE_LINES = 15


class Engine:
    """One rank's model runner and its filled KV pool."""

    def __init__(self, args: Any, nccl_port: int, rank: int, vocab: int) -> None:
        self.rank, self._vocab = rank, vocab
        self.runner = model_runner(args, nccl_port, rank)
        self._kvp = args.dcp.dcp_size if args.dcp else 1
        generator = torch.Generator("cuda").manual_seed(rank)
        pool = self.runner.token_to_kv_pool
        for name in ("k_buffer", "v_buffer", "kv_buffer"):
            for buffer in getattr(pool, name, ()):
                buffer.normal_(generator=generator)

    def measure(self, layout: Layout, batch: int, context: int, steps: int) -> Row:
        """Time one size; every rank of the engine calls it."""
        tokens = self.runner.max_total_num_tokens
        row = Row(layout, batch, context, tokens, tokens // self._kvp, "ok")
        needed = self._place(batch, context + WARM_STEPS + steps)
        if needed is not None:
            return row._replace(status=f"does not fit (needs {needed}, pool {tokens})")
        for _ in self._steps(batch, context, WARM_STEPS):
            pass
        self._barrier()
        events, stamps = [_event()], [time.perf_counter()]
        for _ in self._steps(batch, context + WARM_STEPS, steps):
            events.append(_event())
            stamps.append(time.perf_counter())
        torch.cuda.synchronize()
        times = [first.elapsed_time(last) for first, last in zip(events, events[1:])]
        hosts = [1e3 * (last - first) for first, last in zip(stamps, stamps[1:])]
        slowest = sorted(map(max, zip(*self._gather(times))))
        return row._replace(
            median_ms=round(statistics.median(slowest), 4),
            p95_ms=round(slowest[math.ceil(0.95 * steps) - 1], 4),
            # A host that is far ahead waits: only the minimum is its own time.
            host_ms=round(max(map(min, self._gather(hosts))), 4),
        )

    def profile(self, batch: int, context: int) -> str:
        """Kernels by GPU time, one line each, of the size that was measured last."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self._barrier()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in self._steps(batch, context, PROFILED_STEPS):
                pass
            torch.cuda.synchronize()
        kernels = [
            (event.self_device_time_total, event.count, event.key)
            for event in profiler.key_averages()
            if event.device_type == DeviceType.CUDA
        ]
        total = sum(kernel[0] for kernel in kernels)
        text = f"{total / PROFILED_STEPS:9.1f} us a step, {len(kernels)} kernels\n"
        for us, count, name in sorted(kernels, reverse=True)[:PROFILE_LINES]:
            per_step = f"{us / PROFILED_STEPS:9.1f} us {count / PROFILED_STEPS:7.1f}"
            text += f"{per_step} calls {name[:160]}\n"
        return text

    def _place(self, batch: int, length: int) -> Optional[int]:
        """Give `batch` requests slots for `length` tokens, or tell how many are needed."""
        runner = self.runner
        page = runner.server_args.page_size
        each = -(-length // page) * page
        runner.token_to_kv_pool_allocator.clear()
        slots = runner.token_to_kv_pool_allocator.alloc(batch * each)
        if slots is None:
            return batch * each
        # A server's requests hold scattered pages; all ranks must agree on which.
        generator = torch.Generator("cuda").manual_seed(batch)
        pages = slots.view(-1, page)
        order = torch.randperm(len(pages), generator=generator, device="cuda")
        table = runner.req_to_token_pool.req_to_token
        scattered = pages[order].view(batch, each)[:, :length]
        table[1 : batch + 1, :length] = scattered.to(table.dtype)
        return None

    def _steps(self, batch: int, context: int, count: int) -> Iterator[None]:
        """Enqueue `count` decode steps; yields after each."""
        table = self.runner.req_to_token_pool.req_to_token
        # Row 0 of the table is SGLang's, for padding.
        rows = torch.arange(1, batch + 1, device="cuda")
        lens = torch.full((batch,), context, device="cuda")
        generator = torch.Generator("cuda").manual_seed(context)
        # Other tokens at each step, so that a router spreads them over the experts.
        ids = torch.randint(
            self._vocab, (count, batch), generator=generator, device="cuda"
        )
        for step in range(count):
            lens = lens + 1
            lens_cpu = torch.full((batch,), context + step + 1)
            slots = table[rows, lens - 1].long()
            self._forward(ids[step], rows, lens, lens_cpu, slots)
            yield

    def _forward(
        self, ids: Tensor, rows: Tensor, lens: Tensor, lens_cpu: Tensor, slots: Tensor
    ) -> None:
        from sglang.srt.model_executor import forward_batch_info as info
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        batch = info.ForwardBatch(
            forward_mode=info.ForwardMode.DECODE,
            batch_size=len(rows),
            input_ids=ids,
            req_pool_indices=rows,
            seq_lens=lens,
            out_cache_loc=slots,
            seq_lens_sum=int(lens_cpu.sum()),
            seq_lens_cpu=lens_cpu,
            positions=lens - 1,
            spec_algorithm=SpeculativeAlgorithm.NONE,
            capture_hidden_mode=info.CaptureHiddenMode.NULL,
            num_token_non_padded_cpu=len(rows),
        )
        if not self.runner.forward(batch).can_run_graph:
            raise RuntimeError(f"batch {len(rows)} was not replayed as a CUDA graph")

    def _gather(self, values: list[float]) -> list[list[float]]:
        """`values` of all ranks."""
        group = self.runner.tp_group
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, values, group=group.cpu_group)
        return gathered

    def _barrier(self) -> None:
        torch.cuda.synchronize()
        torch.distributed.barrier(group=self.runner.tp_group.cpu_group)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@torch.no_grad()
def run_rank(
    options: argparse.Namespace,
    layout: Layout,
    args: Any,
    nccl_port: int,
    rank: int,
    results: Connection,
) -> None:
    """One rank of an engine; rank 0 sends rows and profiles, None at the end."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    engine = Engine(args, nccl_port, rank, vocab_size(options.model))

    def send(message: Any) -> None:
        if rank == 0:
            results.send(message)

    send("engine ready, KV pool filled")
    for context in options.contexts:
        for batch in options.batches:
            row = engine.measure(layout, batch, context, options.steps)
            send(row)
            if row.median_ms and [context, batch] == options.profile:
                send((layout, engine.profile(batch, context)))
    send(None)
    # The parent ends all ranks: a graph's communicators have nothing to save.
    time.sleep(3600)


def record(
    options: argparse.Namespace, model: Path, say: Callable[[str], None]
) -> None:
    """Run every layout and write what it sends as it comes."""
    from sglang_dcp.config import DcpConfigError

    stamp = {
        "model": options.model,
        "tp": options.tp,
        "page": options.page_size,
        "attention": options.attention_backend,
        "gpu": torch.cuda.get_device_name(),
        "steps": options.steps,
    }
    with options.csv.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow((*stamp, *Layout._fields, *Row._fields[1:]))
        for layout in (Layout(), *options.layouts):
            say(f"{layout.name}: starting")
            try:
                with closing(run_layout(run_rank, options, layout, model)) as messages:
                    for message in messages:
                        if isinstance(message, Row):
                            table.writerow((*stamp.values(), *layout, *message[1:]))
                            file.flush()
                        elif isinstance(message, tuple):
                            _write_profile(options.csv, *message)
                            message = "profile written"
                        say(f"{layout.name}: {message}")
            except DcpConfigError as error:
                say(f"{layout.name}: refused: {error}")


def _write_profile(csv_file: Path, layout: Layout, text: str) -> None:
    name = f"{csv_file.stem}-profile-{layout.name.replace(':', '-')}.txt"
    csv_file.with_name(name).write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; profiles beside it")
    add("--model", choices=MODELS, default="Qwen3-30B-A3B")
    add("--tp", type=int, default=torch.cuda.device_count())
    add("--layouts", type=Layout.parse, nargs="*", default=[], metavar="KVP:COMM[:q]")
    add("--contexts", type=int, nargs="+", default=[32768, 131072, 262144])
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--steps", type=int, default=40)
    add("--page-size", type=int, default=64)
    add("--attention-backend", default="fa3")
    add("--mem-fraction", type=float, default=0.8)
    add("--profile", type=int, nargs=2, metavar=("CONTEXT", "BATCH"))
    return parser.parse_args()


def main() -> int:
    options = parse()
    from sglang.srt.plugins import load_plugins

    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {text}", flush=True)

    load_plugins()
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        length = max(options.contexts) + WARM_STEPS + options.steps + 1
        model = write_model(Path(folder), options.model, length)
        record(options, model, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
