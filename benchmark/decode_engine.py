"""One rank of an engine whose decode steps are timed: its pool, its requests, its clock."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from bench_release import new_batch, tp_group
from decode_layouts import Layout
from decode_models import DIRECT, PREFILLED
from decode_profile import Kernel, profiled
from decode_runner import model_runner

WARM_STEPS = 10
PROFILED_STEPS = 5
PREFILL_CHUNK = 8192
# Of such logits a router may give every token the same experts, which makes a step shorter.
NOT_FINITE = "logits not finite"


class Row(NamedTuple):
    """One line of the CSV; times are None where the size does not fit the pool."""

    layout: Layout
    batch: int
    context: int
    fill: str
    package: str  # "in" or "out" of the rank's process
    pool_tokens: int  # of the whole layout
    pool_tokens_rank: int  # held by one rank
    weight_bytes: int  # held by one rank
    status: str = "ok"
    median_ms: Optional[float] = None
    p95_ms: Optional[float] = None
    host_ms: Optional[float] = None

    def __str__(self) -> str:
        size = f"context {self.context:>7} batch {self.batch:>3} {self.fill}: "
        if self.median_ms is None:
            return size + self.status
        return (
            size
            + (
                f"{self.median_ms:.3f} ms, p95 {self.p95_ms:.3f}, "
                f"host {self.host_ms:.3f}, pool {self.pool_tokens}, "
                f"weights {self.weight_bytes / 1e9:.3f} GB"
            )
            + (f", {self.status}" if self.status != "ok" else "")
        )


class Engine:
    """One rank's model runner and its KV pool; all ranks make the same calls."""

    def __init__(self, args: Any, nccl_port: int, rank: int, vocab: int) -> None:
        self.rank, self._vocab, self._device = rank, vocab, args.device
        self.runner, self._weight_bytes = model_runner(args, nccl_port, rank)
        # Ranks hold other keys, as they would of a real text.
        self._noise = torch.Generator(self._device).manual_seed(rank)
        self._fill_pool()

    def measure(
        self, layout: Layout, batch: int, context: int, steps: int, fill: str = DIRECT
    ) -> Row:
        """Time decode steps of `batch` requests that start at `context` tokens."""
        package = "in" if "sglang_dcp" in sys.modules else "out"
        # The allocator gives out logical slots, with this package and in SGLang's own DCP,
        # where `max_total_num_tokens` is one rank's.
        tokens = self.runner.token_to_kv_pool_allocator.size
        of_rank = self.runner.token_to_kv_pool.size
        weights = self._weight_bytes
        row = Row(layout, batch, context, fill, package, tokens, of_rank, weights)
        length = context + WARM_STEPS + steps
        needed = self._place(batch, length, scattered=fill == DIRECT)
        if needed is not None:
            return row._replace(status=f"does not fit (needs {needed}, pool {tokens})")
        if fill == PREFILLED:
            for request in range(batch):
                self._prefill(request, context)
        for logits in self._steps(batch, context, WARM_STEPS):
            pass
        if not logits.isfinite().all():
            row = row._replace(status=NOT_FINITE)
        self._barrier()
        marks, stamps = [self._mark()], [time.perf_counter()]
        for _ in self._steps(batch, context + WARM_STEPS, steps):
            marks.append(self._mark())
            stamps.append(time.perf_counter())
        self._synchronize()
        times = [first.elapsed_time(last) for first, last in zip(marks, marks[1:])]
        hosts = [1e3 * (last - first) for first, last in zip(stamps, stamps[1:])]
        slowest = sorted(map(max, zip(*self._gather(times))))
        if fill == PREFILLED:
            self._fill_pool()
        return row._replace(
            median_ms=round(statistics.median(slowest), 4),
            p95_ms=round(slowest[math.ceil(0.95 * steps) - 1], 4),
            # A host that is far ahead waits: only the minimum is its own time.
            host_ms=round(max(map(min, self._gather(hosts))), 4),
        )

    def profile(self, batch: int, context: int) -> list[Kernel]:
        """Kernels of a step of the size that was measured last."""

        def run() -> None:
            # Within the profile: starting it takes the ranks tens of milliseconds, and
            # not the same.
            self._barrier()
            for _ in self._steps(batch, context, PROFILED_STEPS):
                pass
            self._synchronize()

        return profiled(run, PROFILED_STEPS, self._device)

    def _fill_pool(self) -> None:
        pool = self.runner.token_to_kv_pool
        for name in ("k_buffer", "v_buffer", "kv_buffer"):
            for buffer in getattr(pool, name, ()):
                if buffer.dtype.is_floating_point and buffer.dtype.itemsize > 1:
                    buffer.normal_(generator=self._noise)
                else:
                    self._fill_packed(buffer, pool.dtype)

    def _fill_packed(self, buffer: Tensor, dtype: torch.dtype) -> None:
        # torch draws no 8-bit numbers; in parts, for a whole layer is large.
        for part in buffer.view(dtype).split(1 << 16):
            noise = torch.empty_like(part, dtype=torch.float32)
            part.copy_(noise.normal_(generator=self._noise).to(dtype))

    def _place(self, batch: int, length: int, *, scattered: bool) -> Optional[int]:
        """Give `batch` requests slots for `length` tokens, or tell how many are needed."""
        runner, allocator = self.runner, self.runner.token_to_kv_pool_allocator
        # A logical page; that of the arguments is one rank's in SGLang's own DCP.
        page = allocator.page_size
        each = -(-length // page) * page
        allocator.clear()
        slots = allocator.alloc(batch * each)
        if slots is None:
            return batch * each
        pages = slots.view(-1, page)
        if scattered:
            # A busy server's requests hold scattered pages; all ranks must agree on which.
            generator = torch.Generator(self._device).manual_seed(batch)
            order = torch.randperm(len(pages), generator=generator, device=self._device)
            pages = pages[order]
        table = runner.req_to_token_pool.req_to_token
        rows = pages.reshape(batch, each)[:, :length]
        table[1 : batch + 1, :length] = rows.to(table.dtype)
        return None

    def _ids(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(seed)
        return torch.randint(
            self._vocab, shape, generator=generator, device=self._device
        )

    def _prefill(self, request: int, context: int) -> None:
        """Compute the K/V of one request, in chunks as a server does."""
        table = self.runner.req_to_token_pool.req_to_token
        row = torch.tensor([request + 1], device=self._device)
        for start in range(0, context, PREFILL_CHUNK):
            count = min(PREFILL_CHUNK, context - start)
            end = start + count
            self._forward(
                "EXTEND",
                input_ids=self._ids(1000 * request + start, count),
                req_pool_indices=row,
                seq_lens=torch.tensor([end], device=self._device),
                seq_lens_cpu=torch.tensor([end]),
                orig_seq_lens=torch.tensor([end], device=self._device),
                out_cache_loc=table[request + 1, start:end].long(),
                positions=torch.arange(start, end, device=self._device),
                extend_num_tokens=count,
                extend_seq_lens=torch.tensor([count], device=self._device).int(),
                extend_prefix_lens=torch.tensor([start], device=self._device).int(),
                extend_start_loc=torch.zeros(1, device=self._device).int(),
                extend_seq_lens_cpu=[count],
                extend_prefix_lens_cpu=[start],
                extend_logprob_start_lens_cpu=[count],
            )

    def _steps(self, batch: int, context: int, count: int) -> Iterator[Tensor]:
        """Enqueue `count` decode steps; yields the logits of each."""
        table = self.runner.req_to_token_pool.req_to_token
        # Row 0 of the table is SGLang's, for padding.
        rows = torch.arange(1, batch + 1, device=self._device)
        lens = torch.full((batch,), context, device=self._device)
        # Other tokens at each step, so that a router spreads them over the experts.
        ids = self._ids(context, count, batch)
        for step in range(count):
            lens = lens + 1
            output = self._forward(
                "DECODE",
                input_ids=ids[step],
                req_pool_indices=rows,
                seq_lens=lens,
                seq_lens_cpu=torch.full((batch,), context + step + 1),
                out_cache_loc=table[rows, lens - 1].long(),
                positions=lens - 1,
            )
            if self._device == "cuda" and not output.can_run_graph:
                raise RuntimeError(f"batch {batch} was not replayed as a CUDA graph")
            yield output.logits_output.next_token_logits

    def _forward(self, mode: str, **fields: Any) -> Any:
        """Run the model once, and return SGLang's output."""
        from sglang.srt.model_executor import forward_batch_info as info
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        batch = new_batch(
            self.runner,
            {
                "forward_mode": info.ForwardMode[mode],
                "batch_size": len(fields["seq_lens_cpu"]),
                "seq_lens_sum": int(fields["seq_lens_cpu"].sum()),
                "spec_algorithm": SpeculativeAlgorithm.NONE,
                "capture_hidden_mode": info.CaptureHiddenMode.NULL,
                **fields,
            },
        )
        return self.runner.forward(batch)

    def _gather(self, values: list[float]) -> list[list[float]]:
        """`values` of all ranks."""
        group = tp_group()
        gathered: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(gathered, values, group=group.cpu_group)
        return gathered

    def _barrier(self) -> None:
        self._synchronize()
        torch.distributed.barrier(group=tp_group().cpu_group)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _mark(self) -> Any:
        if self._device != "cuda":
            return HostMark(time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class HostMark(NamedTuple):
    """Stands for a CUDA event where there is no GPU."""

    seconds: float

    def elapsed_time(self, later: Any) -> float:
        return float(1e3 * (later.seconds - self.seconds))
