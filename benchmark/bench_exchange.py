"""Time of an exchange of partial attention outputs over all GPUs of this machine.

    python benchmark/bench_exchange.py results.csv

For each size: both exchanges of this package with their parts, SGLang's own merge for
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
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CALLS = 20
WARM_REPLAYS = 3
# tokens, query heads of the KVP group, head dim
SIZES = (
    (1, 64, 128),
    (8, 64, 128),
    (32, 64, 128),
    (64, 64, 128),
    (8, 128, 512),
    (64, 128, 512),
)
COLUMNS = (
    *("launch", "pack", "combine", "raw-a2a", "a2a", "ag_rs", "nccl-ag-rs"),
    *("upstream", "upstream-nccl", "gather-q", "nccl-all-gather"),
)
MERGES = ("combine", "a2a", "ag_rs", "upstream", "upstream-nccl")
# bf16 outputs of a float64 merge differ by 1.6e-3 in this norm.
MAX_RELATIVE_ERROR = 4e-3


class Timing(NamedTuple):
    """Microseconds a call, of the slowest rank, over the replays."""

    median: float
    p95: float


class Peers(NamedTuple):
    """The KVP group of this package, and one as SGLang makes for its own DCP."""

    ours: Any
    upstream: Any


class Inputs(NamedTuple):
    """One rank's tensors of one size; `wanted` is the merged output of its own heads."""

    out: Tensor
    lse: Tensor
    q: Tensor
    wanted: Tensor


def make_inputs(size: tuple[int, int, int], group: Any) -> Inputs:
    """Random partial outputs and LSEs, other ones on each rank, merged in float64."""
    tokens, heads, dim = size
    rank, world_size = group.rank_in_group, group.world_size
    own = heads // world_size
    generator = torch.Generator().manual_seed(sum(size))
    outs = torch.randn(world_size, *size, generator=generator).bfloat16()
    lses = 3 * torch.randn(world_size, tokens, heads, generator=generator)
    weights = lses.double().softmax(0).unsqueeze(-1)
    wanted = (outs.double() * weights).sum(0)
    q = torch.randn(tokens, own, dim, generator=generator).bfloat16() + rank
    return Inputs(
        outs[rank].cuda(),
        lses[rank].cuda(),
        q.cuda(),
        wanted[:, rank * own : (rank + 1) * own].cuda(),
    )


def operations(peers: Peers, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What is timed, by column; those in `MERGES` return merged outputs."""
    from sglang.srt.layers.dcp.comm import cp_lse_ag_out_rs_mha

    from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers
    from sglang_dcp.distributed.exchange import create_exchange
    from sglang_dcp.layers.merge_peers import pack_partials, unpack_combine

    out, lse, q, _ = inputs
    group, world_size = peers.ours, peers.ours.world_size
    rank, heads = group.rank_in_group, out.shape[1] // world_size
    own = slice(rank * heads, (rank + 1) * heads)
    a2a, ag_rs = (create_exchange(name, group) for name in ("a2a", "ag_rs"))
    packed = pack_partials(out, lse, world_size, rank)
    received = torch.empty_like(packed)
    exchange_with_peers(group, received, packed)
    # The plain all-to-all also moves a chunk of the same size to the rank itself.
    sent = packed[:1].repeat(world_size, 1, 1, 1)
    scratch = torch.empty_like(sent)
    gathered = q.new_empty(world_size * q.shape[0], *q.shape[1:])
    weighted = torch.zeros_like(sent[..., : out.shape[-1]], dtype=torch.float32)
    summed = torch.empty_like(weighted[0])

    def nccl_ag_rs() -> None:
        group.all_gather(lse, dim=0)
        group.reduce_scatter_tensor(summed, weighted)

    flag = torch.zeros(1, device="cuda")
    every: dict[str, Callable[[], Any]] = {
        "launch": lambda: flag.add_(1),
        "pack": lambda: pack_partials(out, lse, world_size, rank),
        "combine": lambda: unpack_combine(received, out[:, own], lse[:, own], rank),
        "raw-a2a": lambda: group.all_to_all_single(scratch, sent),
        "a2a": lambda: a2a.reduce(out, lse, is_lse_base_on_e=True),
        "ag_rs": lambda: ag_rs.reduce(out, lse, is_lse_base_on_e=True),
        "nccl-ag-rs": nccl_ag_rs,
        "upstream": lambda: cp_lse_ag_out_rs_mha(out, lse, peers.upstream),
        "upstream-nccl": lambda: cp_lse_ag_out_rs_mha(out, lse, group),
        "gather-q": lambda: a2a.gather_heads(q),
        "nccl-all-gather": lambda: group.all_gather_into_tensor(gathered, q),
    }
    assert tuple(every) == COLUMNS
    return every


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


def check(name: str, result: Tensor, wanted: Tensor) -> str:
    """What is wrong with a merged output on any rank, or ""."""
    error = ((result.double() - wanted).norm() / wanted.norm()).float()
    # max() would drop a NaN.
    error = error.nan_to_num(nan=1e9)
    torch.distributed.all_reduce(error, op=torch.distributed.ReduceOp.MAX)
    if error < MAX_RELATIVE_ERROR:
        return ""
    return f"{name}: relative error {error:.1e}, allowed {MAX_RELATIVE_ERROR}"


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


def measure(
    size: tuple[int, int, int], peers: Peers, replays: int, keep: list[Any]
) -> dict[str, Timing]:
    """Check, then time, every operation of one size; SystemExit for a wrong result."""
    inputs = make_inputs(size, peers.ours)
    every = operations(peers, inputs)
    graphs = {name: capture(operation) for name, operation in every.items()}
    # Graphs hold bare addresses, and peers map the memory of those with custom all-reduce.
    keep.append((every, inputs, graphs))
    for name in MERGES:
        graph, result = graphs[name]
        result.fill_(float("nan"))
        graph.replay()
        if fault := check(f"{name} {size}", result, inputs.wanted):
            sys.exit(fault)
    return {name: time_graph(graph, replays) for name, (graph, _) in graphs.items()}


@contextmanager
def joined(rank: int, world_size: int, folder: str) -> Iterator[Peers]:
    """SGLang's NCCL groups of this rank."""
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
    yield Peers(get_kvp_group(), parallel_state.get_tp_group())
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def run_rank(
    rank: int, world_size: int, folder: str, target: str, replays: int
) -> None:
    """One rank of the benchmark; rank 0 prints and writes."""
    keep: list[Any] = []
    with joined(rank, world_size, folder) as peers, torch.inference_mode():
        results = {size: measure(size, peers, replays, keep) for size in SIZES}
        if rank == 0:
            custom = peers.upstream.ca_comm
            print_table(world_size, results, custom is not None and not custom.disabled)
            write_csv(Path(target), world_size, results)
        torch.cuda.synchronize()


def print_table(
    world_size: int, results: dict[tuple[int, int, int], Any], custom_all_reduce: bool
) -> None:
    print(
        f"KVP {world_size}, {torch.cuda.get_device_name()}, bf16, us a call: median/p95; "
        f"SGLang's custom all-reduce {'on' if custom_all_reduce else 'off'}"
    )
    head = ("tokens", "heads x dim", *COLUMNS, "a2a/(raw+launch)", "upstream/ag_rs")
    lines: list[tuple[str, ...]] = [head]
    for (tokens, heads, dim), row in results.items():
        floor = row["raw-a2a"].median + row["launch"].median
        times = (f"{row[c].median:.1f}/{row[c].p95:.1f}" for c in COLUMNS)
        ratios = (
            f"{row['a2a'].median / floor:.2f}",
            f"{row['upstream'].median / row['ag_rs'].median:.2f}",
        )
        lines.append((str(tokens), f"{heads} x {dim}", *times, *ratios))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(" | ".join(map(str.rjust, line, widths)))


def write_csv(path: Path, world_size: int, results: dict[Any, Any]) -> None:
    from importlib.metadata import version

    stamp = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "sglang": version("sglang"),
        "nccl_graph_mixing": os.environ.get("NCCL_GRAPH_MIXING_SUPPORT", "default"),
        "kvp": world_size,
        "dtype": "bfloat16",
    }
    head = (*stamp, "tokens", "heads", "dim", "operation", "median_us", "p95_us")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(head)
        for size, row in results.items():
            for name, timing in row.items():
                rounded = (f"{value:.2f}" for value in timing)
                table.writerow((*stamp.values(), *size, name, *rounded))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="where the results go")
    parser.add_argument("--replays", type=int, default=100)
    arguments = parser.parse_args()
    world_size = torch.cuda.device_count()
    if world_size < 2:
        sys.exit(f"needs 2 GPUs, found {world_size}")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run_rank,
            (world_size, folder, str(arguments.csv), arguments.replays),
            nprocs=world_size,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
