"""Cases of `symm_a2a` on one GPU: data with every kind of poison, float64 references."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from sglang_dcp.ops.partials_torch import combine_with_peers_torch

NAN, INF = float("nan"), float("inf")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Q_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}
# Relative error of a merge that rounds once, at most.
ROUNDING = {"fp16": 5e-4, "bf16": 4e-3, "fp32": 1e-6}
LSE_TOLERANCE = 1e-5
DIMS = (64, 96, 128, 192, 256, 512)
LAYOUTS = ("dense", "strided", "gaps", "misaligned")
SHAPES = ((1, 1), (5, 3), (64, 5), (5, 8), (64, 32), (1, 32))
LN2 = 0.6931471805599453
# Simulated at once on one GPU, and on their own.
WORLDS = (2, 3, 4, 5, 8)
LOOPBACK = 3
EMPTY_WORDS = (2, 8)
# tokens, local heads, head dim; two of them share a kernel.
SEQUENCE = ((1, 8, 128), (5, 3, 96), (64, 8, 128), (33, 2, 128))


class Case(NamedTuple):
    """`heads` are a rank's own; `masked` cases come with `empty_rows`."""

    world_size: int
    tokens: int
    heads: int
    dim: int
    dtype: str
    base: str
    layout: str
    masked: bool


def reduce_cases() -> dict[str, Case]:
    """All head dims for all worlds; dtypes with two ranks, elsewhere in turn."""
    sizes = [(2, dim, dtype) for dim, dtype in itertools.product(DIMS, DTYPES)]
    for world_size in (3, 4, 5, 8):
        dtypes = itertools.islice(itertools.cycle(DTYPES), world_size % 3, None)
        sizes += [(world_size, dim, dtype) for dim, dtype in zip(DIMS, dtypes)]
    found = []
    for i, (world_size, dim, dtype) in enumerate(sizes):
        tokens, heads = SHAPES[(i + i // 6) % len(SHAPES)]
        layout, base = LAYOUTS[(i + i // 4) % 4], "e2"[(i + i // 6) % 2]
        shape = (world_size, tokens, heads, dim)
        found.append(Case(*shape, dtype, base, layout, i % 3 > 0))
    # More chunks than blocks, several times over.
    found.append(Case(2, 300, 32, 128, "bf16", "e", "dense", True))
    found.append(Case(8, 300, 32, 128, "bf16", "e", "strided", False))
    return {"reduce-N{}-T{}-h{}-D{}-{}-{}-{}-{}".format(*c): c for c in found}


def gather_cases() -> dict[str, Case]:
    """Row sizes from one vector to a block; MLA's queries have 576 values."""
    sizes = itertools.product((2, 8), Q_DTYPES, (64, 128, 192, 576))
    found = [
        Case(n, *SHAPES[i % 6], dim, dtype, "e", LAYOUTS[i % 4], False)
        for i, (n, dtype, dim) in enumerate(sizes)
        if (dtype, dim) != ("fp32", 576)
    ]
    found.append(Case(3, 5, 3, 16, "fp8", "e", "dense", False))
    found.append(Case(5, 300, 32, 128, "bf16", "e", "strided", False))
    return {"gather-N{}-T{}-h{}-D{}-{}-{}-{}-{}".format(*c): c for c in found}


def empty_word_cases(world_size: int) -> list[Case]:
    """Queries whose every word is the one that means "nothing came yet"."""
    rest = ("e", "dense", False)
    return [Case(world_size, 1, 2, 128, dtype, *rest) for dtype in Q_DTYPES]


def loopback_cases(world_size: int) -> list[tuple[Case, int]]:
    """With the rank that plays each."""
    return [
        (Case(world_size, 33, 3, dim, "bf16", "e", "strided", True), rank)
        for dim, rank in itertools.product((96, 128), range(world_size))
    ]


class Data(NamedTuple):
    """Partial states of all ranks, as their kernels would leave them."""

    outs: Tensor  # [N, tokens, N * heads, dim]
    lses: Tensor  # [N, tokens, N * heads]
    empty: Optional[Tensor]  # [N, tokens]


def random_data(case: Case, seed: int) -> Data:
    """A third of the shards is empty, marked in each way and full of NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    more: Any = {"generator": generator, "device": "cuda"}
    shape = (case.world_size, case.tokens, case.world_size * case.heads)
    outs = torch.randn(*shape, case.dim, **more).to(DTYPES[case.dtype])
    lses = 5 * torch.randn(shape, **more)
    choice = torch.randint(0, 12, shape, **more)
    for i, mark in enumerate((-INF, NAN, INF)):
        lses[choice == i] = mark
    # The pattern that means "nothing came yet", as an LSE and in a live payload.
    lses.view(torch.int32)[choice == 3] = -1
    lses[:, 0, 0] = -INF
    empty = None
    if case.masked:
        empty = torch.rand(shape[:2], **more) < 0.25
    outs[~live(lses, empty)] = NAN
    words = outs.view(torch.int32)
    words[:, -1, :, 1] = -1
    words[1, -1, :, -1] = -1
    return Data(outs, lses, empty)


def live(lses: Tensor, empty: Optional[Tensor]) -> Tensor:
    finite = lses.isfinite()
    return finite if empty is None else finite & ~empty[..., None]


def wanted(case: Case, data: Data, rank: int) -> tuple[Tensor, Tensor]:
    """Merged state of a rank's local heads in float64."""
    own = slice(rank * case.heads, (rank + 1) * case.heads)
    unit = 1.0 if case.base == "e" else LN2
    alive = live(data.lses, data.empty)[..., own]
    lses = (unit * data.lses[..., own].double()).masked_fill(~alive, -INF)
    weights = lses.softmax(0).masked_fill(~alive, 0.0)
    outs = data.outs[..., own, :].double().masked_fill(~alive[..., None], 0.0)
    return (outs * weights[..., None]).sum(0), lses.logsumexp(0) / unit


def merged_by_a2a(case: Case, data: Data, rank: int) -> Tensor:
    """The combine of `a2a` over the same rows, as its reference does it.

    That its kernel agrees is the business of `test_partials_gpu`; here it would have to
    be compiled for each case.
    """
    own = slice(rank * case.heads, (rank + 1) * case.heads)
    lses = data.lses[..., own].masked_fill(~live(data.lses, data.empty)[..., own], -INF)
    peers = [peer for peer in range(case.world_size) if peer != rank]
    outs = data.outs[..., own, :]
    base_e = case.base == "e"
    merged, _ = combine_with_peers_torch(
        outs[peers], lses, outs[rank], lses[rank], rank, is_lse_base_on_e=base_e
    )
    return merged.to(outs.dtype)


def arranged(rows: Tensor, layout: str) -> Tensor:
    """The same [tokens, heads, dim] in memory of another layout."""
    tokens, heads, dim = rows.shape
    if layout == "strided":
        return rows.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "gaps":
        # Starts on whole vectors, as a slice of a fused projection does.
        gap = 16 // rows.itemsize
        wide = rows.new_zeros(tokens, heads + 2, dim + gap)
        wide[:, 1:-1, gap:] = rows
        return wide[:, 1:-1, gap:]
    if layout == "misaligned":
        flat = rows.new_zeros(rows.numel() + 1)
        flat[1:] = rows.reshape(-1)
        return flat[1:].view(rows.shape)
    return rows.contiguous()


def arranged_lse(lse: Tensor, layout: str) -> Tensor:
    return lse.contiguous() if layout == "dense" else lse.mT.contiguous().mT


def arranged_empty(empty: Optional[Tensor], layout: str) -> Optional[Tensor]:
    if empty is None or layout == "dense":
        return empty
    return torch.stack((empty, ~empty), 1)[:, 0]


def relative_error(got: Tensor, ideal: Tensor) -> float:
    """Of what is not NaN; NaN must be where it should be."""
    assert torch.equal(got.isnan(), ideal.isnan())
    error = (got.double() - ideal).nan_to_num(0.0).norm()
    return (error / ideal.nan_to_num(0.0).norm().clamp_min(1e-30)).item()
