"""Kernels around an exchange compiled for a GPU, against their references on CPU.

Only this file sees what the interpreter of `test_partials.py` cannot: code generation
for each size and dtype, the GPU's exp and log, and CUDA graphs. All goes through the
public functions of `partials`, so that dispatch is tested as well. The ranks are
simulated on one GPU; a case runs one of them, cases take turns.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.merge_gpu import (
    DTYPES,
    LSE_TOLERANCE,
    NAN,
    OWN_HEADS,
    ROUNDING,
    Case,
    capture,
    inputs,
    on_device,
    poison,
)
from helpers.nccl_ranks import needs_gpus
from helpers.peer_exchange import both_exchanges, heads_of, received_by, same_bits
from sglang_dcp.ops import lse_merge_torch, partials, partials_torch

pytestmark = [needs_gpus(1), pytest.mark.usefixtures(poison.__name__)]

KERNELS = ("pack", "cut", "unpack_combine", "combine_from_peers", "interleave")
DIMS = (33, 64, 96, 128, 192, 256, 512)
SHARDS = (2, 3, 8)


def cases() -> dict[str, Case]:
    """All sizes and dtypes; layouts and log bases take turns."""
    found = []
    sizes = itertools.product(KERNELS, DIMS, SHARDS, DTYPES)
    for i, (kernel, dim, n, dtype) in enumerate(sizes):
        layout = "strided" if (i // 3) % 2 else "dense"
        found.append(Case(kernel, n, 5, dim, dtype, layout, "e2"[(i // 2) % 2]))
    for kernel, dtype in itertools.product(KERNELS, DTYPES):
        found.append(Case(kernel, 2, 0, 128, dtype, "dense", "e"))
        found.append(Case(kernel, 2, 9, 128, dtype, "strided", "2"))
        # More programs than a GPU holds at once.
        found.append(Case(kernel, 2, 4999, 128, dtype, "dense", "2"))
        found.append(Case(kernel, 3, 2499, 128, dtype, "strided", "e"))
    return {"{}-N{}-T{}-D{}-{}-{}-{}".format(*case): case for case in found}


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str) -> None:
    case = CASES[name]
    rank = list(CASES).index(name) % case.shards
    outs, lses = inputs(case, name)
    if case.kernel == "interleave":
        gathered = torch.stack(outs[rank].chunk(case.shards, dim=1)).cuda()
        assert same_bits(partials.interleave_heads(gathered).cpu(), outs[rank])
    elif "combine" in case.kernel:
        check_combine(case, outs, lses, rank)
    else:
        check_rows(case, outs, lses, rank)


def check_rows(case: Case, outs: Tensor, lses: Tensor, rank: int) -> None:
    out, lse = (x[rank] for x in on_device(case, outs, lses))
    if case.kernel == "cut":
        cut = partials.slice_for_peers(out, case.shards, rank)
        wanted = partials_torch.slice_for_peers_torch(outs[rank], case.shards, rank)
        assert same_bits(cut.cpu(), wanted)
        return
    packed = partials.pack_partials(out, lse, case.shards, rank).cpu()
    wanted = partials_torch.pack_partials_torch(
        outs[rank], lses[rank], case.shards, rank
    )
    both = (
        partials_torch.split_packed(rows, case.head_dim) for rows in (packed, wanted)
    )
    assert all(same_bits(got, want) for got, want in zip(*both))


def check_combine(case: Case, outs: Tensor, lses: Tensor, rank: int) -> None:
    base = {"is_lse_base_on_e": case.base == "e"}
    heads, world = heads_of(rank, OWN_HEADS), case.shards
    device_outs, device_lses = on_device(case, outs, lses)
    own, own_lse = device_outs[rank, :, heads], device_lses[rank, :, heads]
    if case.kernel == "unpack_combine":
        sent = [
            partials_torch.pack_partials_torch(*state, world, p)
            for p, state in enumerate(zip(outs, lses))
        ]
        rows = received_by(rank, sent).cuda()
        got = partials.unpack_combine(rows, own, own_lse, rank, **base)
    else:
        sent = [
            partials_torch.slice_for_peers_torch(out, world, p)
            for p, out in enumerate(outs)
        ]
        rows, gathered = received_by(rank, sent).cuda(), device_lses[:, :, heads]
        got = partials.combine_from_peers(rows, gathered, own, rank, **base)
    assert got[0].dtype == outs.dtype and got[0].is_contiguous()
    check_merged(case, got, outs, lses, rank)


def check_merged(
    case: Case, got: tuple[Tensor, Tensor], outs: Tensor, lses: Tensor, rank: int
) -> None:
    """`got` of `rank` against the merge of its heads over all ranks, on CPU."""
    heads = heads_of(rank, OWN_HEADS)
    out, lse = lse_merge_torch.lse_weighted_combine_torch(
        outs[:, :, heads], lses[:, :, heads], is_lse_base_on_e=case.base == "e"
    )
    tol = ROUNDING[case.dtype]
    torch.testing.assert_close(got[0].cpu(), out.to(outs.dtype), rtol=tol, atol=tol)
    tol = LSE_TOLERANCE
    torch.testing.assert_close(got[1].cpu(), lse, rtol=tol, atol=tol)


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_on_new_inputs(dtype: str, layout: str) -> None:
    """All kernels in one graph; every replay gets new data and other empty shards."""
    case = Case("graph", 2, 8, 128, dtype, layout, "e")
    static = on_device(case, *inputs(case, "capture"))

    def body() -> list[tuple[Tensor, Tensor]]:
        gathered = torch.stack(static[0][0].chunk(2, dim=1))
        every = (partials.interleave_heads(gathered), static[1][0])
        ranks: Iterator[tuple[Tensor, Tensor]] = itertools.chain.from_iterable(
            both_exchanges(*static, rank) for rank in range(2)
        )
        return [every, *ranks]

    graph, (every, *merged) = capture(body)
    for replay in range(4):
        outs, lses = inputs(case, f"replay {replay}")
        static[0].copy_(outs)
        static[1].copy_(lses)
        for result in (every[0], *itertools.chain(*merged)):
            result.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(every[0].cpu(), outs[0])
        for index, got in enumerate(merged):
            check_merged(case, got, outs, lses, rank=index // 2)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
