"""LSE-merge kernels compiled for a GPU, against their references on CPU.

Only this file sees what the interpreter of `test_merge.py` cannot: code generation for
each size and dtype, the GPU's exp and log, 64-bit addresses, and CUDA graphs. All goes
through the public functions of `merge`, so that dispatch is tested as well.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gpu import needs_gpus
from sglang_dcp.layers import merge, merge_ref

pytestmark = needs_gpus(1)

DEVICE = "cuda"
NAN, INF = float("nan"), float("inf")
KERNELS = ("combine", "correct", "merge_two")
DIMS = (33, 64, 96, 128, 256, 512)
SHARDS = (1, 2, 3, 5, 8)
OWN_HEADS = 2
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Both sides compute in fp32: one rounding to the payload's dtype, and exp and log of a GPU.
ROUNDING = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 5e-6}
LSE_TOLERANCE = 1e-5


class Case(NamedTuple):
    kernel: str
    shards: int
    tokens: int
    head_dim: int
    dtype: str
    layout: str
    base: str


def cases() -> dict[str, Case]:
    """All sizes and dtypes; layouts and log bases take turns."""
    found = []
    sizes = itertools.product(KERNELS, DIMS, SHARDS, DTYPES)
    for i, (kernel, dim, n, dtype) in enumerate(sizes):
        if kernel == "merge_two" and n != 2:
            continue
        layout = "strided" if (i // 3) % 2 else "dense"
        found.append(Case(kernel, n, 5, dim, dtype, layout, "e2"[(i // 2) % 2]))
    for kernel, dtype in itertools.product(KERNELS, DTYPES):
        found.append(Case(kernel, 2, 0, 128, dtype, "dense", "e"))
        found.append(Case(kernel, 2, 1500, 128, dtype, "dense", "2"))
        found.append(Case(kernel, 2, 9, 128, dtype, "strided", "e"))
        found.append(Case(kernel, 2, 9, 128, dtype, "strided", "2"))
    return {"{}-N{}-T{}-D{}-{}-{}-{}".format(*case): case for case in found}


CASES = cases()


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh tensors hold NaN: an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def inputs(case: Case, seed: str) -> tuple[Tensor, Tensor]:
    """Partial outputs and LSEs on CPU: a third is empty, marked in each way, holding NaN."""
    gen = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    shape = (case.shards, case.tokens, case.shards * OWN_HEADS)
    outs = torch.randn(*shape, case.head_dim, generator=gen).to(DTYPES[case.dtype])
    lses = 5 * torch.randn(*shape, generator=gen)
    choice = torch.randint(0, 9, shape, generator=gen)
    for i, mark in enumerate((-INF, NAN, INF)):
        lses[choice == i] = mark
    # One row without any key.
    lses[:, :1, 0] = -INF
    outs[~lses.isfinite()] = NAN
    return outs, lses


def on_device(case: Case, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Copies in the layout of the case; gaps between strided elements hold NaN."""
    outs, lses = outs.to(DEVICE), lses.to(DEVICE)
    if case.layout == "dense":
        return outs, lses
    gaps = outs.new_full((*outs.shape[:-1], 2 * case.head_dim), NAN)
    gaps[..., ::2] = outs
    return gaps[..., ::2], lses.mT.contiguous().mT


def call(case: Case, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The function under test by its public name; (out, lse)."""
    base = {"is_lse_base_on_e": case.base == "e"}
    if case.kernel == "combine":
        return merge.lse_weighted_combine(outs, lses, return_lse=True, **base)
    if case.kernel == "correct":
        rank = case.shards - 1
        by_head = outs.new_empty(outs.shape[2], outs.shape[1], outs.shape[3]).float()
        corrected = by_head.fill_(NAN).transpose(0, 1)
        return merge.correct_attn_out(
            outs[rank], lses, rank, corrected=corrected, **base
        )
    return merge.merge_two_states(outs[0], lses[0], outs[1], lses[1], **base)


def reference(case: Case, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """What `merge_ref` says of the same inputs, on CPU."""
    base = {"is_lse_base_on_e": case.base == "e"}
    if case.kernel == "correct":
        if case.shards == 1:
            return outs[0], lses[0]
        return merge_ref.correct_attn_out_ref(outs[-1], lses, case.shards - 1, **base)
    if case.kernel == "combine" and case.shards == 1:
        return outs[0], lses[0]
    return merge_ref.lse_weighted_combine_ref(outs, lses, **base)


def check(case: Case, got: tuple[Tensor, Tensor], outs: Tensor, lses: Tensor) -> None:
    """`got` against the reference of (outs, lses)."""
    out, lse = reference(case, outs, lses)
    identity = case.shards == 1 and case.kernel in ("combine", "correct")
    if identity:
        tolerances = (0.0, 0.0)
    else:
        tolerances = (ROUNDING[case.dtype], LSE_TOLERANCE)
    for actual, want, tol in zip(got, (out.to(got[0].dtype), lse), tolerances):
        torch.testing.assert_close(
            actual.cpu(), want, rtol=tol, atol=tol, equal_nan=tol == 0.0
        )


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name: str) -> None:
    case = CASES[name]
    outs, lses = inputs(case, name)
    check(case, call(case, *on_device(case, outs, lses)), outs, lses)


def capture(
    body: Callable[[], list[tuple[Tensor, Tensor]]],
) -> tuple[torch.cuda.CUDAGraph, list[tuple[Tensor, Tensor]]]:
    """A graph of `body` and the results that its replays fill."""
    body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = body()
    return graph, results


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_on_new_inputs(dtype: str, layout: str) -> None:
    """All kernels in one graph; every replay gets new data and other empty shards."""
    every = [Case(kernel, 2, 8, 128, dtype, layout, "e") for kernel in KERNELS]
    static = on_device(every[0], *inputs(every[0], "capture"))
    graph, results = capture(lambda: [call(case, *static) for case in every])
    for replay in range(4):
        outs, lses = inputs(every[0], f"replay {replay}")
        static[0].copy_(outs)
        static[1].copy_(lses)
        for result in itertools.chain(*results):
            result.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        for case, result in zip(every, results):
            check(case, result, outs, lses)


def test_shards_further_apart_than_32_bits() -> None:
    """A stride over shards of 2**31 elements and more: the address needs 64 bits."""
    case = Case("combine", 2, 4, 64, "fp16", "dense", "e")
    outs, lses = inputs(case, "far apart")
    _, tokens, heads, dim = outs.shape
    shard = tokens * heads * dim
    memory = torch.empty(2**31 + shard, dtype=torch.float16, device=DEVICE)
    far = memory.as_strided(outs.shape, (2**31, heads * dim, dim, 1))
    far.copy_(outs)
    check(case, call(case, far, lses.to(DEVICE)), outs, lses)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
