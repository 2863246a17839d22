"""Inputs of the merge kernels on a GPU, and graphs of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DEVICE = "cuda"


NAN, INF = float("nan"), float("inf")


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
