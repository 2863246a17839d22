"""Cases of `symm_a2a` on one GPU: data with every kind of poison, float64 references."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from sglang_dcp.layers.merge_peers import cut_combine
from symm_sim import SimulatedRanks

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
    """Merged state of a rank's own heads in float64."""
    own = slice(rank * case.heads, (rank + 1) * case.heads)
    unit = 1.0 if case.base == "e" else LN2
    alive = live(data.lses, data.empty)[..., own]
    lses = (unit * data.lses[..., own].double()).masked_fill(~alive, -INF)
    weights = lses.softmax(0).masked_fill(~alive, 0.0)
    outs = data.outs[..., own, :].double().masked_fill(~alive[..., None], 0.0)
    return (outs * weights[..., None]).sum(0), lses.logsumexp(0) / unit


def merged_by_a2a(case: Case, data: Data, rank: int) -> Tensor:
    """The combine of `a2a` over the same rows."""
    own = slice(rank * case.heads, (rank + 1) * case.heads)
    lses = data.lses[..., own].masked_fill(~live(data.lses, data.empty)[..., own], -INF)
    peers = [peer for peer in range(case.world_size) if peer != rank]
    outs = data.outs[..., own, :]
    cut = outs[peers].contiguous()
    base_e = case.base == "e"
    merged = cut_combine(
        cut, lses.contiguous(), outs[rank], rank, is_lse_base_on_e=base_e
    )
    assert isinstance(merged, Tensor)
    return merged


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


class Step:
    """Gather and reduce of one size over buffers that are filled anew each time."""

    def __init__(self, ranks: SimulatedRanks, size: tuple[int, int, int]) -> None:
        n, (tokens, heads, dim) = ranks.world_size, size
        self._case = Case(n, tokens, heads, dim, "bf16", "e", "dense", False)
        more = {"device": "cuda", "dtype": torch.bfloat16}
        self._outs = torch.empty(n, tokens, n * heads, dim, **more)
        self._lses = torch.empty(n, tokens, n * heads, device="cuda")
        self._q = torch.empty(n, tokens, heads, dim, **more)
        self._ranks = ranks
        self._replay, self._results = ranks.capture(self._call)

    def _call(self, rank: int) -> tuple[Tensor, Tensor]:
        exchange = self._ranks.exchanges[rank]
        state = self._outs[rank], self._lses[rank]
        gathered = exchange.gather_heads(self._q[rank])
        return gathered, exchange.reduce(*state, is_lse_base_on_e=True)

    def run(self, generator: torch.Generator, captured: bool) -> Tensor:
        """The largest error of any rank; inf where a query differs."""
        for tensor in (self._outs, self._lses, self._q):
            tensor.normal_(generator=generator)
        results = self._results
        if captured:
            self._replay()
        else:
            results = self._ranks.all(self._call)
        data, worst = Data(self._outs, self._lses, None), torch.zeros((), device="cuda")
        every = self._q.transpose(0, 1).flatten(1, 2)
        for rank, (gathered, out) in enumerate(results):
            ideal, _ = wanted(self._case, data, rank)
            error = ((out.double() - ideal).norm() / ideal.norm()).float()
            error = error.masked_fill((gathered != every).any(), INF)
            worst = torch.maximum(worst, error)
        return worst
