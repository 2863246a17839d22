"""One rank of `bench_exchange.py`: its groups, its graphs, its clock."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import exchange_report as report
from bench_release import init_groups, own_dcp_group
from exchange_operations import (
    COLUMNS,
    QUICK_COLUMNS,
    Peers,
    from_fresh_inputs,
    gate,
    make_exchanges,
    make_inputs,
    operations,
    peer_copy,
)
from exchange_report import Row, Size, Timing

# A replay must last well over what a host needs to enqueue one (a meeting, two events and
# the graph, some 100 us), or the ranks wait for each other's hosts.
REPLAY_US = 400.0
PROBE_CALLS, MOST_CALLS = 20, 256
PROBE_REPLAYS, WARM_REPLAYS = 5, 3
# Over all columns, one after the other: what disturbs the machine for a while meets one.
ROUNDS = 2
# 16 KiB to 8 MiB of partial output: grouped-query heads, and MLA's.
SIZES: tuple[Size, ...] = (
    *((tokens, 64, 128) for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
    *((tokens, 128, 512) for tokens in (1, 2, 4, 8, 16, 32, 64)),
)
QUICK_SIZES: tuple[Size, ...] = (
    *((tokens, 64, 128) for tokens in (1, 8, 64)),
    *((tokens, 128, 512) for tokens in (4, 64)),
)
QUICK_REPLAYS = 30
# Past every cache.
COPY_BYTES = 256 << 20


class Plan(NamedTuple):
    """What a run measures."""

    sizes: Sequence[Size]
    columns: Sequence[str]
    replays: int

    @classmethod
    def of(cls, quick: bool, replays: int | None) -> Plan:
        if quick:
            return cls(QUICK_SIZES, QUICK_COLUMNS, replays or QUICK_REPLAYS)
        return cls(SIZES, COLUMNS, replays or 100)


class Captured(NamedTuple):
    """A graph of `calls` calls, and the result that the last of them fills."""

    graph: Any
    result: Any
    calls: int


def capture(call: Callable[[], Any], calls: int) -> Captured:
    """As a server captures its decode steps, with the DCP group taking part."""
    from sglang.srt.distributed import parallel_state

    from sglang_dcp.distributed.groups import graph_capture_with_dcp

    graph = torch.cuda.CUDAGraph()
    with graph_capture_with_dcp(parallel_state.graph_capture) as context:
        for _ in range(2):
            call()
        context.stream.synchronize()
        with torch.cuda.graph(graph, stream=context.stream):
            for _ in range(calls):
                result = call()
    return Captured(graph, result, calls)


def calls_for(probe_us: float) -> int:
    """Calls of a graph that lasts long enough, from what one takes in a short one."""
    return min(MOST_CALLS, max(PROBE_CALLS, math.ceil(REPLAY_US / probe_us)))


def long_enough(call: Callable[[], Any], keep: list[Any]) -> Captured:
    """A graph whose replay the hosts can keep up with; as many calls on all ranks."""
    short = capture(call, PROBE_CALLS)
    keep.append(short)
    calls = calls_for(time_graph(short, PROBE_REPLAYS)[0])
    if calls == PROBE_CALLS:
        return short
    graph = capture(call, calls)
    keep.append(graph)
    return graph


def time_graph(captured: Captured, replays: int) -> tuple[float, float]:
    """Median and 95th percentile of a call in us; the slowest rank's, on all ranks."""
    flag = torch.zeros(1, device="cuda")
    events = []
    for _ in range(WARM_REPLAYS + replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # A meeting of the ranks on the GPU, on a communicator that no graph uses.
        torch.distributed.all_reduce(flag)
        begin.record()
        captured.graph.replay()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = torch.tensor([a.elapsed_time(b) for a, b in events[WARM_REPLAYS:]])
    slowest = (1000 * times / captured.calls).cuda()
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    return slowest.median().item(), slowest.quantile(0.95).item()


def time_in_turns(graphs: dict[str, Captured], replays: int) -> dict[str, Timing]:
    """`ROUNDS` rounds over all columns; the faster one counts."""
    rounds = [
        {name: time_graph(graph, replays) for name, graph in graphs.items()}
        for _ in range(ROUNDS)
    ]
    return {
        name: Timing.of([times[name] for times in rounds], graph.calls)
        for name, graph in graphs.items()
    }


def measure(size: Size, peers: Peers, plan: Plan, keep: list[Any]) -> dict[str, Timing]:
    """Check, then time, the operations of one size; SystemExit for a wrong result."""
    inputs = make_inputs(size, peers.ours)
    every = operations(peers, inputs)
    fresh = from_fresh_inputs(peers, inputs)
    graphs = {name: long_enough(every[name], keep) for name in plan.columns}
    checked = {
        name: capture(fresh[name], 1) if name in fresh else graph
        for name, graph in graphs.items()
    }
    # Graphs hold bare addresses, and peers map the memory of those with custom all-reduce.
    keep.append((every, inputs, checked))
    gate(size, checked, inputs)
    return time_in_turns(graphs, plan.replays)


def copy_rate(group: Any) -> float:
    """Bytes a second of a large copy into the next rank's memory, all ranks at once."""
    copy, keep = peer_copy(group, COPY_BYTES)
    median, _ = time_graph(capture(copy, calls=4), replays=10)
    del keep
    return COPY_BYTES / median * 1e6


def with_floors(size: Size, row: Row, world_size: int, rate: float) -> Row:
    """`row` and the time of its bytes at `rate`, each after a launch."""
    sent = {
        "nvlink": report.sent_bytes(size, world_size),
        "nvlink-q": report.sent_bytes_q(size, world_size),
    }
    launch = row["launch"]
    floors = {name: launch.later(1e6 * count / rate) for name, count in sent.items()}
    return {**row, **floors}


@contextmanager
def joined(
    rank: int, world_size: int, folder: str, custom_all_reduce: bool
) -> Iterator[tuple[Any, Any]]:
    """The NCCL groups of this rank: our DCP group, and that of SGLang's own DCP.

    Without the plugin, whose hooks would import half of SGLang: nothing else of them
    takes part here.
    """
    from sglang.srt.distributed import parallel_state

    from sglang_dcp.distributed import groups
    from sglang_dcp.distributed.topology import Layout

    torch.cuda.set_device(rank)
    parallel_state.set_custom_all_reduce(custom_all_reduce)
    parallel_state.init_distributed_environment(
        world_size=world_size,
        rank=rank,
        distributed_init_method=f"file://{folder}/store",
        local_rank=rank,
        backend="nccl",
    )
    init_groups(world_size, dcp_size=world_size)
    groups.init_dcp_groups(Layout(world_size, 1))
    yield groups.get_dcp_group(), own_dcp_group()
    groups.destroy_dcp_groups()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def run_rank(
    rank: int, world_size: int, folder: str, target: Path, plan: Plan, began: float
) -> None:
    """One rank of the benchmark; rank 0 prints and writes."""

    def say(text: str) -> None:
        if rank == 0:
            print(f"[{time.time() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    say("imported")
    keep: list[Any] = []
    results: dict[Size, Row] = {}
    custom_all_reduce = "upstream" in plan.columns
    with joined(rank, world_size, folder, custom_all_reduce) as (ours, upstream):
        with torch.inference_mode():
            say("groups made")
            peers = Peers(ours, upstream, make_exchanges(ours, plan.sizes))
            rate = copy_rate(ours)
            say(f"peer copy {rate / 1e9:.0f} GB/s")
            for size in plan.sizes:
                row = measure(size, peers, plan, keep)
                results[size] = with_floors(size, row, world_size, rate)
                say(f"{size} done")
                if rank == 0:
                    # Each time: a run that is cut off leaves what it has.
                    report.write_csv(target, report.stamp(world_size, rate), results)
            if rank == 0:
                _print(world_size, rate, upstream.ca_comm, results)
                report.plot_beside(target)
            torch.cuda.synchronize()


def _print(world_size: int, rate: float, custom: Any, results: dict[Size, Row]) -> None:
    on = "on" if custom is not None and not custom.disabled else "off"
    title = (
        f"DCP {world_size}, {torch.cuda.get_device_name()}, bf16, peer copy "
        f"{rate / 1e9:.0f} GB/s, SGLang's custom all-reduce {on}"
    )
    report.print_table(title, results)
