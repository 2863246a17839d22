"""Cases of the merge kernels in Triton's interpreter."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")


EMPTY_LSES = {"minus-inf": -INF, "nan": NAN, "plus-inf": INF}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# Both sides compute in fp32: what may differ is one rounding to the payload's dtype.
ROUNDING = {"fp16": 1e-3, "bf16": 8e-3, "fp32": 3e-6}


class Case(NamedTuple):
    kernel: str
    shards: int
    tokens: int
    local_heads: int
    head_dim: int
    dtype: str
    layout: str
    base: str


def kernel_cases(kernels: Iterable[str]) -> dict[str, Case]:
    cases = []
    for kernel in kernels:
        for i, (dim, n) in enumerate({64: 3, 96: 2, 128: 5, 512: 1, 33: 7}.items()):
            for j, dtype in enumerate(DTYPES):
                layout = "strided" if (i + j) % 2 else "dense"
                cases.append(Case(kernel, n, 2, 1, dim, dtype, layout, "2e"[i % 2]))
        cases.append(Case(kernel, 2, 3, 3, 64, "bf16", "strided", "2"))
        cases.append(Case(kernel, 3, 0, 1, 64, "bf16", "dense", "e"))
    return {"{}-N{}-T{}-h{}-D{}-{}-{}-{}".format(*case): case for case in cases}


def assert_same(actual: Tensor, wanted: Tensor, tol: float = 0.0) -> None:
    torch.testing.assert_close(actual, wanted, rtol=tol, atol=tol)


def kernel_inputs(name: str, case: Case) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = (case.shards, case.tokens, case.shards * case.local_heads)
    outs = torch.randn(*shape, case.head_dim, generator=gen).to(DTYPES[case.dtype])
    lses = 5 * torch.randn(*shape, generator=gen)
    choice = torch.randint(0, 6, shape, generator=gen)
    for i, mark in enumerate(EMPTY_LSES.values()):
        lses[choice == i] = mark
    lses[:, :1, 0] = -INF
    outs[~lses.isfinite()] = NAN
    if case.layout == "dense":
        return outs, lses
    gaps = torch.full((*shape, 2 * case.head_dim), NAN, dtype=outs.dtype)
    gaps[..., ::2] = outs
    return gaps[..., ::2], lses.mT.contiguous().mT


def work(cases: dict[str, Case], run: Callable[[str, Case], None]) -> None:
    """In a worker: print `{case name: fault or ""}`."""
    results = {}
    for name, case in cases.items():
        try:
            run(name, case)
            results[name] = ""
        except AssertionError as error:
            results[name] = str(error) or "bits differ"
    print(json.dumps(results))
