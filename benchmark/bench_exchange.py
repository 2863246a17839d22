"""Time of an exchange of partial attention outputs over all GPUs of this machine.

    python benchmark/bench_exchange.py results.csv [--quick]

For each size: the exchanges of this package, the parts of `a2a`, SGLang's own merge for
grouped-query DCP on the same tensors, and the gather of the query heads. Results are
checked against float64 first; a wrong one ends the run before anything is printed.

A time is per call of a CUDA graph of 20 calls, replayed many times on random data. Ranks
meet before each replay, the slowest one counts; the table holds the median and the 95th
percentile. Not measured: cold caches (the attention kernel has just written what is
exchanged), eager mode, overlap with compute.

`launch` is a kernel that does next to nothing, in such a graph. `raw-a2a` is a plain
`all_to_all_single` of rows like those of `a2a`; `nccl-ag-rs` the two NCCL collectives of an
all-gather of the LSE and a reduce-scatter in fp32, without any kernel. `upstream` runs on a
group with SGLang's defaults for its DCP group, thus with its custom all-reduce where that
takes the size; `upstream-nccl` on ours, which has NCCL only.

`nvlink` and `nvlink-q` are no measurement but a floor: the bytes that a rank must send,
at the rate of a large plain copy into the next rank's memory, all ranks at once, measured
in this run, and `launch`. `--quick` takes few sizes and columns, for tuning.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import exchange_report as report
from exchange_operations import (
    COLUMNS,
    QUICK_COLUMNS,
    Peers,
    gate,
    make_exchanges,
    make_inputs,
    operations,
    peer_copy,
)
from exchange_report import Row, Size, Timing

CALLS = 20
WARM_REPLAYS = 3
# 16 KiB to 8 MiB of partial output: grouped-query heads, and MLA's.
SIZES: tuple[Size, ...] = (
    *((tokens, 64, 128) for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    *((tokens, 128, 512) for tokens in (1, 2, 4, 8, 16, 32, 64)),
)
QUICK_SIZES: tuple[Size, ...] = (
    *((tokens, 64, 128) for tokens in (1, 8, 32, 64, 512)),
    *((tokens, 128, 512) for tokens in (1, 4, 64)),
)
# Past every cache.
COPY_BYTES = 256 << 20


class Plan(NamedTuple):
    """What a run measures."""

    sizes: Sequence[Size]
    columns: Sequence[str]
    replays: int


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `CALLS` calls and the result that the last of them fills."""
    from sglang.srt.distributed import parallel_state

    graph = torch.cuda.CUDAGraph()
    with parallel_state.graph_capture() as context:
        for _ in range(2):
            call()
        context.stream.synchronize()
        with torch.cuda.graph(graph, stream=context.stream):
            for _ in range(CALLS):
                result = call()
    return graph, result


def time_graph(graph: torch.cuda.CUDAGraph, replays: int) -> Timing:
    """Replay and time on the GPU; all ranks take part."""
    flag = torch.zeros(1, device="cuda")
    events = []
    for _ in range(WARM_REPLAYS + replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A meeting of the ranks on the GPU, on a communicator that no graph uses.
        torch.distributed.all_reduce(flag)
        begin.record()
        graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = torch.tensor([a.elapsed_time(b) for a, b in events[WARM_REPLAYS:]])
    slowest = (1000 * times / CALLS).cuda()
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    return Timing(slowest.median().item(), slowest.quantile(0.95).item())


def measure(size: Size, peers: Peers, plan: Plan, keep: list[Any]) -> dict[str, Timing]:
    """Check, then time, the operations of one size; SystemExit for a wrong result."""
    inputs = make_inputs(size, peers.ours)
    every = operations(peers, inputs)
    graphs = {name: capture(every[name]) for name in plan.columns}
    # Graphs hold bare addresses, and peers map the memory of those with custom all-reduce.
    keep.append((every, inputs, graphs))
    gate(size, graphs, inputs)
    return {
        name: time_graph(graph, plan.replays) for name, (graph, _) in graphs.items()
    }


def copy_rate(group: Any) -> float:
    """Bytes a second of a large copy into the next rank's memory, all ranks at once."""
    copy, keep = peer_copy(group, COPY_BYTES)
    graph, _ = capture(copy)
    slowest = time_graph(graph, replays=10).median
    del keep
    return COPY_BYTES / slowest * 1e6


def with_floors(size: Size, row: Row, world_size: int, rate: float) -> Row:
    """`row` and the time of its bytes at `rate`, each after a launch."""
    sent = {
        "nvlink": report.sent_bytes(size, world_size),
        "nvlink-q": report.sent_bytes_q(size, world_size),
    }
    launch = row["launch"]
    floors = {
        name: Timing(*(time + 1e6 * count / rate for time in launch))
        for name, count in sent.items()
    }
    return {**row, **floors}


@contextmanager
def joined(rank: int, world_size: int, folder: str) -> Iterator[tuple[Any, Any]]:
    """SGLang's NCCL groups of this rank: our KVP group, and one as SGLang makes."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins

    from sglang_dcp.config import DcpConfig
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.distributed.groups import get_kvp_group
    from sglang_dcp.distributed.topology import Layout

    torch.cuda.set_device(rank)
    load_plugins()
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store",
        local_rank=rank,
        backend="nccl",
    )
    set_context(DcpContext(DcpConfig(Layout(world_size, 1)), rank))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    # The TP group has the options with which SGLang makes its DCP group.
    yield get_kvp_group(), parallel_state.get_tp_group()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def run_rank(rank: int, world_size: int, folder: str, target: Path, plan: Plan) -> None:
    """One rank of the benchmark; rank 0 prints and writes."""
    keep: list[Any] = []
    with joined(rank, world_size, folder) as (ours, upstream), torch.inference_mode():
        peers = Peers(ours, upstream, make_exchanges(ours, plan.sizes))
        rate = copy_rate(ours)
        results = {
            size: with_floors(size, measure(size, peers, plan, keep), world_size, rate)
            for size in plan.sizes
        }
        if rank == 0:
            custom = upstream.ca_comm
            on = "on" if custom is not None and not custom.disabled else "off"
            title = (
                f"KVP {world_size}, {torch.cuda.get_device_name()}, bf16, peer copy "
                f"{rate / 1e9:.0f} GB/s, SGLang's custom all-reduce {on}"
            )
            report.print_table(title, results)
            report.write_csv(target, report.stamp(world_size, rate), results)
            report.plot_beside(target)
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="where the results go")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="few sizes and columns")
    options = parser.parse_args()
    world_size = torch.cuda.device_count()
    if world_size < 2:
        sys.exit(f"needs 2 GPUs, found {world_size}")
    plan = Plan(SIZES, COLUMNS, options.replays)
    if options.quick:
        plan = Plan(QUICK_SIZES, QUICK_COLUMNS, options.replays)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run_rank, (world_size, folder, options.csv, plan), nprocs=world_size
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
