"""LSE-merge kernels compiled for a GPU, against their references on CPU.

Only this file sees what the interpreter of `test_lse_merge.py` cannot: code generation for
each size and dtype, the GPU's exp and log, 64-bit addresses, and CUDA graphs. All goes
through the public functions of `lse_merge`, so that dispatch is tested as well.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from helpers.merge_gpu import (
    DEVICE,
    DTYPES,
    LSE_TOLERANCE,
    NAN,
    ROUNDING,
    Case,
    capture,
    inputs,
    on_device,
)
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.ops import lse_merge, lse_merge_torch

pytestmark = needs_gpus(1)

KERNELS = ("combine", "correct", "merge_two")
DIMS = (33, 64, 96, 128, 256, 512)
SHARDS = (1, 2, 3, 5, 8)


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


def call(case: Case, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The function under test by its public name; (out, lse)."""
    base = {"is_lse_base_on_e": case.base == "e"}
    if case.kernel == "combine":
        both = lse_merge.lse_weighted_combine(outs, lses, return_lse=True, **base)
        assert isinstance(both, tuple)
        return both
    if case.kernel == "correct":
        rank = case.shards - 1
        by_head = outs.new_empty(outs.shape[2], outs.shape[1], outs.shape[3]).float()
        corrected = by_head.fill_(NAN).transpose(0, 1)
        return lse_merge.correct_attn_out(
            outs[rank], lses, rank, corrected=corrected, **base
        )
    return lse_merge.merge_two_states(outs[0], lses[0], outs[1], lses[1], **base)


def reference(case: Case, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """What ``lse_merge_torch`` says of the same inputs, on CPU."""
    base = {"is_lse_base_on_e": case.base == "e"}
    if case.kernel == "correct":
        if case.shards == 1:
            return outs[0], lses[0]
        return lse_merge_torch.correct_attn_out_torch(
            outs[-1], lses, case.shards - 1, **base
        )
    if case.kernel == "combine" and case.shards == 1:
        return outs[0], lses[0]
    return lse_merge_torch.lse_weighted_combine_torch(outs, lses, **base)


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
        for tensor in itertools.chain(*results):
            tensor.fill_(NAN)
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
