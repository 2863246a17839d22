"""What `bench_exchange.py` times: operations by column, their inputs, their right results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench_release import publishes
from exchange_report import BYTES_A_VALUE, Size, partial_bytes

# SGLang's own merges; its all-to-all came after 0.5.16.
UPSTREAM: tuple[str, ...] = ("upstream", "upstream-nccl", "upstream-mla")
if publishes():
    UPSTREAM += ("upstream-a2a",)
COLUMNS = (
    *("launch", "pack", "combine", "raw-a2a", "a2a", "ag_rs", "symm_a2a"),
    *("nccl-ag-rs", *UPSTREAM),
    *("gather-q", "symm-gather-q", "upstream-gather-q", "nccl-all-gather"),
)
QUICK_COLUMNS: tuple[str, ...] = ("launch", "a2a", "symm_a2a", "symm-gather-q")
if publishes():
    QUICK_COLUMNS += ("ag_rs", "upstream-a2a", "upstream-mla", "upstream")
    QUICK_COLUMNS += ("upstream-gather-q",)
QUICK_COLUMNS += ("nccl-all-gather",)
MERGES = ("combine", "a2a", "ag_rs", "symm_a2a", *UPSTREAM)
GATHERS = ("gather-q", "symm-gather-q", "upstream-gather-q")
# bf16 outputs of a float64 merge differ by 1.6e-3 in this norm.
MAX_RELATIVE_ERROR = 4e-3


class Peers(NamedTuple):
    """The DCP group of this package, that of SGLang's own DCP, exchanges."""

    ours: Any
    upstream: Any
    exchanges: dict[str, Any]


class Inputs(NamedTuple):
    """One rank's tensors of one size.

    `wanted` is the merged output of its local heads, `every_q` the queries of all ranks.
    """

    out: Tensor
    lse: Tensor
    q: Tensor
    wanted: Tensor
    every_q: Tensor


def make_exchanges(group: Any, sizes: Sequence[Size]) -> dict[str, Any]:
    """The exchanges that all sizes share, as all layers and batches of a server do."""
    from sglang_dcp.distributed.exchange import WorkspaceSpec, create_exchange

    tokens, heads, dim = max(sizes, key=partial_bytes)
    spec = WorkspaceSpec(tokens, heads // group.world_size, BYTES_A_VALUE * dim)
    every = {name: create_exchange(name, group) for name in ("a2a", "ag_rs")}
    symm: Any = create_exchange("symm_a2a", group, spec)
    if symm.in_use != "symm_a2a":
        raise RuntimeError(f"symm_a2a fell back to a2a: {symm.fallbacks.counts}")
    # Without collectives: a fallback to a2a, which would be timed as symm_a2a, raises.
    symm.group = SimpleNamespace(
        world_size=group.world_size, rank_in_group=group.rank_in_group
    )
    return {**every, "symm_a2a": symm}


def make_inputs(size: Size, group: Any) -> Inputs:
    """Random partial outputs and LSEs, other ones on each rank, merged in float64."""
    tokens, heads, dim = size
    rank, world_size = group.rank_in_group, group.world_size
    own = heads // world_size
    # The same numbers on all ranks, whose GPUs are of one kind.
    generator = torch.Generator("cuda").manual_seed(sum(size))
    more: Any = {"generator": generator, "device": "cuda"}
    outs = torch.randn(world_size, *size, **more).bfloat16()
    lses = 3 * torch.randn(world_size, tokens, heads, **more)
    every_q = torch.randn(size, **more).bfloat16()
    mine = slice(rank * own, (rank + 1) * own)
    weights = lses[..., mine].double().softmax(0).unsqueeze(-1)
    wanted = (outs[:, :, mine].double() * weights).sum(0)
    q = every_q[:, mine].contiguous()
    return Inputs(outs[rank].clone(), lses[rank].clone(), q, wanted, every_q)


def operations(peers: Peers, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What is timed, by column; `MERGES` return merged outputs, `GATHERS` all queries."""
    out, lse, q, _, _ = inputs
    a2a, ag_rs, symm = (peers.exchanges[n] for n in ("a2a", "ag_rs", "symm_a2a"))
    flag = torch.zeros(1, device="cuda")
    every: dict[str, Callable[[], Any]] = {
        "launch": lambda: flag.add_(1),
        "a2a": lambda: a2a.reduce(out, lse, is_lse_base_on_e=True)[0],
        "ag_rs": lambda: ag_rs.reduce(out, lse, is_lse_base_on_e=True)[0],
        "symm_a2a": lambda: symm.reduce(out, lse, is_lse_base_on_e=True)[0],
        "gather-q": lambda: a2a.gather_heads(q),
        "symm-gather-q": lambda: symm.gather_heads(q),
        **_parts(peers, inputs),
        **_upstream(peers, inputs),
    }
    return {name: every[name] for name in COLUMNS}


def _parts(peers: Peers, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """The kernels around an exchange, and what NCCL takes for the bytes alone."""
    from sglang_dcp.distributed.all_to_all import group_all_to_all_single
    from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers
    from sglang_dcp.ops.partials import pack_partials, unpack_combine

    out, lse, q, _, _ = inputs
    group, world_size = peers.ours, peers.ours.world_size
    rank, heads = group.rank_in_group, out.shape[1] // world_size
    own = slice(rank * heads, (rank + 1) * heads)
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

    return {
        "pack": lambda: pack_partials(out, lse, world_size, rank),
        "combine": lambda: unpack_combine(received, out[:, own], lse[:, own], rank)[0],
        "raw-a2a": lambda: group_all_to_all_single(group, scratch, sent),
        "nccl-ag-rs": nccl_ag_rs,
        "nccl-all-gather": lambda: group.all_gather_into_tensor(gathered, q),
    }


def _upstream(peers: Peers, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """SGLang's own merges and gather, given what its attention backends give them.

    Its Triton backend has an output in fp32 for grouped queries, and its merge of those
    may write into it. FlashInfer's LSE of latents is to base 2.
    """
    from sglang.srt.layers.dcp import comm

    out, lse, q, _, _ = inputs
    group = peers.upstream
    wide, lse2 = out.float(), lse / math.log(2)
    every: dict[str, Callable[[], Any]] = {
        "upstream": lambda: comm.cp_lse_ag_out_rs_mha(wide, lse, group),
        "upstream-nccl": lambda: comm.cp_lse_ag_out_rs_mha(wide, lse, peers.ours),
        "upstream-mla": lambda: comm.cp_lse_ag_out_rs_mla(out, lse2, group).transpose(
            0, 1
        ),
        "upstream-gather-q": lambda: group.all_gather(q, dim=1),
    }
    if "upstream-a2a" in UPSTREAM:
        every["upstream-a2a"] = lambda: comm.dcp_a2a_lse_reduce(
            out, lse2, group, is_lse_base_on_e=False
        )
    return every


def from_fresh_inputs(peers: Peers, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What `gate` runs in place of the operations that write into their inputs."""
    from sglang.srt.layers.dcp.comm import cp_lse_ag_out_rs_mha

    def merged(group: Any) -> Tensor:
        return cp_lse_ag_out_rs_mha(inputs.out.float(), inputs.lse, group)

    return {
        "upstream": lambda: merged(peers.upstream),
        "upstream-nccl": lambda: merged(peers.ours),
    }


def peer_copy(group: Any, size: int) -> tuple[Callable[[], Any], Any]:
    """A plain copy of `size` bytes into the next rank's memory; and what it needs."""
    from torch.distributed import _symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    # Inference tensors could not be handed to the rendezvous.
    with torch.inference_mode(False):
        buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(buffer, group.device_group)
    peer = (group.rank_in_group + 1) % group.world_size
    target = handle.get_buffer(peer, (size,), torch.uint8)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    return lambda: target.copy_(source), (buffer, handle, source)


def gate(size: Size, graphs: Mapping[str, Any], inputs: Inputs) -> None:
    """SystemExit where a result is wrong on any rank."""
    wanted = {**dict.fromkeys(MERGES, inputs.wanted)}
    wanted |= dict.fromkeys(GATHERS, inputs.every_q.double())
    # In the order of the columns, the same on all ranks.
    for name, captured in graphs.items():
        if name not in wanted:
            continue
        result = captured.result
        result.fill_(float("nan"))
        captured.graph.replay()
        allowed = MAX_RELATIVE_ERROR if name in MERGES else 0.0
        if fault := _fault(result, wanted[name], allowed):
            sys.exit(f"{name} {size}: {fault}")


def _fault(result: Tensor, wanted: Tensor, allowed: float) -> str:
    error = ((result.double() - wanted).norm() / wanted.norm()).float()
    # max() would drop a NaN.
    error = error.nan_to_num(nan=1e9)
    torch.distributed.all_reduce(error, op=torch.distributed.ReduceOp.MAX)
    if error <= allowed:
        return ""
    return f"relative error {error:.1e}, allowed {allowed}"
