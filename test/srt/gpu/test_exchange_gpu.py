"""All-to-all and exchanges between GPU ranks, over NCCL and SGLang's own groups.

Only this file runs PyNccl's calls, captures collectives in CUDA graphs through SGLang's
`graph_capture`, and launches the kernels where the exchange does. Every rank holds other
data, every replay gets new data, the oracle is float64. The file is its own worker.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.gloo_ranks import Outcomes, fault_of
from helpers.nccl_ranks import Ranks, capture, needs_gpus, run_rank
from helpers.random_bytes import random_bytes
from sglang_dcp.distributed.all_to_all import (
    group_all_to_all_single,
    pynccl_all_to_all_single,
)
from sglang_dcp.distributed.exchange import EXCHANGES, Exchange, create_exchange
from sglang_dcp.releases.installed import in_range, sglang_version

WORLD_SIZE = 2
REPLAYS = 3
KEYS = 37
LN2 = 0.6931471805599453
NAN, INF = float("nan"), float("inf")
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIRE_DTYPES = (
    "float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 "
    "bool int8 uint8 int16 int32 int64"
).split()
# Rows a rank sends to each rank, and their shape; 2 MiB a peer is past NCCL's low-latency
# protocols.
SHAPES = ((3, 2, 5), (1, 1), (0, 4), (1, 524288))
NCCL = ("ag_rs", "a2a")
MODES = ("eager", "captured")
ALL_TO_ALL = ("torch", "pynccl", "pynccl-stream", "captured")
# Later releases have methods of their own, which take fewer dtypes and no stream.
AS_METHODS = in_range(sglang_version(), None, "0.5.17")
PLAIN = (("bf16",), ("2",), ("dense",))
# A partial output is rounded once before and once after the exchange.
TOLERANCE = {"fp16": 3e-3, "bf16": 2e-2, "fp32": 1e-5}


class Case(NamedTuple):
    """One exchange: `heads` are a rank's own."""

    backend: str
    mode: str
    tokens: int
    heads: int
    dim: int
    dtype: str
    base: str
    layout: str


def exchange_cases() -> dict[str, Case]:
    sizes, layouts = ((0, 3, 96), (1, 3, 96), (5, 3, 96)), ("dense", "strided")
    large = ((64, 32, 128), (8, 64, 512), (700, 8, 64))
    every = (
        *itertools.product(EXCHANGES, MODES, sizes, FLOATS, "e2", layouts),
        *itertools.product(EXCHANGES, MODES, large, *PLAIN),
    )
    found = [Case(backend, mode, *size, *rest) for backend, mode, size, *rest in every]
    return {"{}-{}-T{}-h{}-D{}-{}-{}-{}".format(*case): case for case in found}


CASES = exchange_cases()


@lru_cache(maxsize=None)
def exchange_of(name: str, group: Any) -> Exchange:
    """One for all cases, as a server has: `symm_a2a` then goes on where it was."""
    exchange = create_exchange(name, group)
    # Else another one would be judged in its place.
    assert exchange.in_use == name, exchange.fallbacks.counts
    return exchange


def check_groups(group: Any) -> None:
    """What `init_dcp_groups` asks for on GPU: PyNccl in captures and nowhere else."""
    comm = group.pynccl_comm
    sends: list[Any] = []
    assert comm is not None and comm.available and comm.disabled
    assert group.ca_comm is None and group.world_size == WORLD_SIZE
    send, source = comm.nccl.ncclSend, torch.ones(WORLD_SIZE, device="cuda")
    case = Case("", "", 5, 3, 96, "bf16", "e", "dense")
    state = on_device(case, data_of(group, case, 1))
    reduces = (exchange_of(name, group).reduce for name in NCCL)
    calls: list[Callable[[], Any]] = [
        partial(of_group(group), torch.empty_like(source), source),
        *(partial(reduce, *state, is_lse_base_on_e=True) for reduce in reduces),
    ]

    def noted(*arguments: Any) -> Any:
        sends.append(arguments)
        return send(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm.nccl, "ncclSend", noted)
        for number, call in enumerate(calls, 1):
            before = len(sends)
            call()
            assert len(sends) == before
            capture(call)
            wanted = 2 * number * (WORLD_SIZE - 1)
            assert len(sends) == wanted, "warm-up and capture, to each peer"
    assert comm.disabled


def check_agree(group: Any, mode: str) -> None:
    """Exchanges over NCCL sum the same numbers in the same order."""
    case = Case("", mode, 64, 8, 128, "bf16", "2", "strided")
    state = on_device(case, data_of(group, case, 3))
    exchanges = [exchange_of(name, group) for name in NCCL]

    def every() -> list[tuple[Tensor, Tensor]]:
        return [
            exchange.reduce(*state, is_lse_base_on_e=False) for exchange in exchanges
        ]

    if mode == "captured":
        graph, results = capture(every)
        graph.replay()
    else:
        results = every()
    torch.cuda.synchronize()
    for result in results[1:]:
        assert all(same_bits(*pair) for pair in zip(result, results[0]))


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    both = (part.cpu().reshape(-1).view(torch.uint8) for part in (actual, wanted))
    return actual.shape == wanted.shape and torch.equal(*both)


def check_all_to_all(group: Any, mode: str, dtype: torch.dtype) -> None:
    faults = []
    for index, shape in enumerate(SHAPES):
        shape = (WORLD_SIZE * shape[0], *shape[1:])
        source, output = (random_bytes(shape, dtype, seed).cuda() for seed in (1, 2))
        exchange = all_to_all_of(mode, group, output, source)
        for replay in range(REPLAYS):
            seeds = [1000 * replay + 10 * index + rank for rank in range(WORLD_SIZE)]
            sources = [random_bytes(shape, dtype, seed) for seed in seeds]
            source.copy_(sources[group.rank_in_group])
            exchange()
            torch.cuda.synchronize()
            parts = [data.chunk(WORLD_SIZE)[group.rank_in_group] for data in sources]
            if shape[0] and not same_bits(output, torch.cat(parts)):
                faults.append(f"shape {shape}, replay {replay}")
    assert not faults


def all_to_all_of(
    mode: str, group: Any, output: Tensor, source: Tensor
) -> Callable[[], Any]:
    """One all-to-all from `source` to `output`, over the way that `mode` names."""
    if mode == "torch":
        return partial(of_group(group), output, source)
    if mode == "captured":
        graph, _ = capture(partial(of_group(group), output, source))
        return graph.replay
    comm, stream = group.pynccl_comm, None
    if mode == "pynccl-stream":
        stream = torch.cuda.Stream()

    def over_pynccl() -> None:
        torch.cuda.synchronize()
        with comm.change_state(enable=True):
            of_comm(comm)(output, source, stream=stream)

    return over_pynccl


def of_group(group: Any) -> Callable[..., None]:
    """Our all-to-all of a group: SGLang's method, where a hook makes it that."""
    if AS_METHODS:
        return group.all_to_all_single
    return partial(group_all_to_all_single, group)


def of_comm(comm: Any) -> Callable[..., None]:
    if AS_METHODS:
        return comm.all_to_all_single
    return partial(pynccl_all_to_all_single, comm)


class Data(NamedTuple):
    """A rank's partial state of all heads, and the merged state of its local heads."""

    out: Tensor
    lse: Tensor
    wanted: Tensor
    wanted_lse: Tensor


def data_of(group: Any, case: Case, seed: int) -> Data:
    """Attention over keys dealt to the ranks in turn, in float64; the same on all ranks."""
    rank, generator = group.rank_in_group, torch.Generator().manual_seed(seed)
    heads = case.heads * WORLD_SIZE
    q, k, v = (
        torch.randn(n, heads, case.dim, generator=generator, dtype=torch.float64)
        for n in (case.tokens, KEYS, KEYS)
    )
    scores = 2 * torch.einsum("thd,shd->ths", q, k) / case.dim**0.5
    # Lengths 0 and 1 leave no rank, and only rank 0, with a key.
    lengths = torch.randint(2, KEYS + 1, (case.tokens,), generator=generator)
    lengths[seed % 3 :: 5], lengths[(seed + 1) % 3 :: 5] = 0, 1
    position = torch.arange(KEYS)
    scores = scores.masked_fill(position >= lengths.view(-1, 1, 1), -INF)
    # The softmax over no keys is NaN: this is the poison of an empty shard.
    local = scores.masked_fill(position % WORLD_SIZE != rank, -INF)
    unit = 1.0 if case.base == "e" else LN2
    own = slice(rank * case.heads, (rank + 1) * case.heads)
    wanted = torch.einsum("ths,shd->thd", scores.softmax(-1).nan_to_num(0.0), v)
    return Data(
        torch.einsum("ths,shd->thd", local.softmax(-1), v).to(FLOATS[case.dtype]),
        (local.logsumexp(-1) / unit).float(),
        wanted[:, own].float(),
        (scores.logsumexp(-1) / unit)[:, own].float(),
    )


def on_device(case: Case, data: Data) -> tuple[Tensor, Tensor]:
    out, lse = data.out.cuda(), data.lse.cuda()
    if case.layout == "dense":
        return out, lse
    by_head = out.transpose(0, 1).contiguous().transpose(0, 1)
    return by_head, lse.mT.contiguous().mT


def check_exchange(group: Any, case: Case) -> None:
    exchange = exchange_of(case.backend, group)
    out, lse = on_device(case, data_of(group, case, 1))

    def merged() -> tuple[Tensor, Tensor]:
        return exchange.reduce(out, lse, is_lse_base_on_e=case.base == "e")

    replayed = capture(merged) if case.mode == "captured" else None
    seen = []
    # All communication before the first assertion: a failing rank must not leave.
    for seed in range(2, 2 + REPLAYS):
        data = data_of(group, case, seed)
        out.copy_(data.out)
        lse.copy_(data.lse)
        if replayed is None:
            results = merged()
        else:
            graph, results = replayed
            for result in results:
                result.fill_(NAN)
            graph.replay()
        torch.cuda.synchronize()
        seen.append((data, [result.cpu() for result in results]))
    assert all(result.is_contiguous() for result in results)
    for data, (got, got_lse) in seen:
        assert_merged(case, data, got, got_lse)


def assert_merged(case: Case, data: Data, got: Tensor, got_lse: Tensor) -> None:
    tol = TOLERANCE[case.dtype]
    assert got.dtype == data.out.dtype and got_lse.dtype == torch.float32
    torch.testing.assert_close(got.float(), data.wanted, rtol=tol, atol=tol)
    torch.testing.assert_close(got_lse, data.wanted_lse, rtol=1e-5, atol=1e-5)


def check_gather_heads(group: Any, mode: str, backend: str) -> None:
    rank, faults = group.rank_in_group, []
    for dtype, tokens in itertools.product(FLOATS.values(), (0, 1, 5, 64)):
        exchange = exchange_of(backend, group)
        shape = (tokens, 4 * WORLD_SIZE, 96)
        every = [random_bytes(shape, dtype, seed) for seed in range(1 + REPLAYS)]
        own = [q.chunk(WORLD_SIZE, dim=1)[rank] for q in every]
        q = own[0].cuda()
        gather = partial(exchange.gather_heads, q)
        captured = capture(gather) if mode == "captured" else None
        for replay in range(1, 1 + REPLAYS):
            q.copy_(own[replay])
            if captured is None:
                gathered = gather()
            else:
                graph, gathered = captured
                graph.replay()
            torch.cuda.synchronize()
            if not same_bits(gathered, every[replay]):
                faults.append(f"{dtype}, {tokens} tokens, replay {replay}")
    assert not faults


def check_layers(group: Any, backend: str) -> None:
    """Three layers in one graph, their temporaries in shared memory of the graph's pool."""
    case = Case(backend, "captured", 5, 3, 96, "bf16", "e", "dense")
    exchange = exchange_of(backend, group)
    static = [on_device(case, data_of(group, case, 1)) for _ in range(3)]

    def layers() -> list[tuple[Tensor, Tensor]]:
        merged = []
        for out, lse in static:
            exchange.gather_heads(out[:, : case.heads])
            merged.append(exchange.reduce(out, lse, is_lse_base_on_e=True))
        return merged

    graph, results = capture(layers)
    seen: list[tuple[Data, tuple[Tensor, Tensor]]] = []
    for seed in (10, 20, 30):
        every = [data_of(group, case, seed + layer) for layer in range(3)]
        for (out, lse), data in zip(static, every):
            out.copy_(data.out)
            lse.copy_(data.lse)
        graph.replay()
        torch.cuda.synchronize()
        seen += zip(every, [(out.cpu(), lse.cpu()) for out, lse in results])
    for data, (got, got_lse) in seen:
        assert_merged(case, data, got, got_lse)


def checks(group: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    for mode, name in itertools.product(ALL_TO_ALL, WIRE_DTYPES):
        check = partial(check_all_to_all, group, mode, getattr(torch, name))
        yield f"all_to_all-{mode}-{name}", check
    for name, case in CASES.items():
        yield name, partial(check_exchange, group, case)
    for mode in MODES:
        for backend in ("a2a", "symm_a2a"):
            check = partial(check_gather_heads, group, mode, backend)
            yield f"gather_heads-{mode}-{backend}", check
        yield f"agree-{mode}", partial(check_agree, group, mode)
    for backend in EXCHANGES:
        yield f"layers-in-one-graph-{backend}", partial(check_layers, group, backend)
    yield "groups", partial(check_groups, group)


def body(group: Any) -> Outcomes:
    for name, check in checks(group):
        yield name, fault_of(check)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(__file__, WORLD_SIZE, tmp_path_factory.mktemp("nccl"))


@needs_gpus(WORLD_SIZE)
@pytest.mark.parametrize("name", [name for name, _ in checks(None)])
def test_every_rank(name: str, ranks: Ranks) -> None:
    ranks.assert_passed(name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_rank(body, Path(sys.argv[2])))
    sys.exit(pytest.main([__file__]))
