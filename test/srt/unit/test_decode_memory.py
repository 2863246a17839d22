"""What a decode step with DCP allocates, against tensors counted while the real code runs.

A verification is one: its kernels see a row for each request, with the heads of all its
query tokens. Only this file sees that the number in the log counts these.
"""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from helpers.allocating_ranks import serving, total, without_splits
from helpers.attention_oracle import Shape, Step, decode, verify
from helpers.backend_ranks import FP8, Case
from helpers.kernels_that_allocate import fa3_splits, fa3_tile
from helpers.live_bytes import LiveBytes
from sglang_dcp.layers.backends.fa3_splits import Fa3Heads, decode_split_bytes
from sglang_dcp.layers.decode_memory import PLANNED, decode_parts
from sglang_dcp.layers.forward_sizes import ForwardSizes

GQA = Shape(8, 2, 64, 64)
ONE_KV_HEAD = Shape(8, 1, 64, 64)
# Three query tokens of a K/V head's 8 heads are two tiles of Triton's 16.
PADDED = Shape(24, 3, 64, 64)
MANY_KV_HEADS = Shape(8, 8, 64, 64)
MLA = Shape(8, 1, 576, 512, latent=True)
COMMITTED = dict(a=70, b=150, c=31, d=2)
REQUESTS = len(COMMITTED)

SHAPES = {
    "fa3": (GQA, ONE_KV_HEAD, PADDED, MANY_KV_HEADS, MLA),
    "flashinfer": (GQA, MLA),
    "triton": (GQA, ONE_KV_HEAD, PADDED, MANY_KV_HEADS),
}
CASES = [
    Case(backend, shape, device="cpu", width=width, max_len=200)
    for backend, shapes in SHAPES.items()
    for shape in shapes
    for width in (1, 3)
    # SGLang's own backend for heads does not speculate with DCP.
    if (backend, shape.latent, width) != ("flashinfer", False, 3)
]
FP8_CASES = [
    Case(backend, GQA, dtype, FP8, scale=2.0, device="cpu", width=width, max_len=200)
    for backend, dtype, width in itertools.product(
        ("fa3", "triton"), (torch.float16, torch.bfloat16), (1, 3)
    )
]
QWEN = ForwardSizes("fa3", 8, 2, 1, 1, 128, 128, 2, 2)
LITE = ForwardSizes("fa3", 8, 2, 1, 1, 576, 512, 2, 2, latent=True)


def name_of(case: Case) -> str:
    shape, stored = case.shape, "" if case.kv_dtype is None else f"-fp8-{case.dtype}"
    kind = "mla" if shape.latent else f"{shape.q_heads}q{shape.kv_heads}kv"
    return f"{case.backend}-{kind}-width{case.width}-dcp{case.dcp_size}{stored}"


def step_of(case: Case) -> Step:
    requests = "".join(COMMITTED)
    return decode(requests) if case.width == 1 else verify(requests, case.width)


def taken_and_told(
    case: Case, comm_backend: str = "a2a", *, replicated: bool = False
) -> tuple[int, int]:
    """Bytes of a step, without what is planned before it and what a model hands in."""
    with serving(case, comm_backend, replicated=replicated) as (at_work, sizes):
        sizes = without_splits(at_work, sizes)
        for request, committed in COMMITTED.items():
            at_work.group.served.grow(request, committed)
        at_work.peak(step_of(case))
        taken = at_work.peak(step_of(case))
    parts = decode_parts(sizes, REQUESTS, captured=True)
    known = (PLANNED, "projected queries of the DCP group")
    return taken, sum(size for part, size in parts.items() if part not in known)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_step_allocates_what_is_told(case: Case) -> None:
    taken, told = taken_and_told(case)
    assert taken <= told <= 1.02 * taken


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_step_with_projected_queries_allocates_what_is_told(case: Case) -> None:
    taken, told = taken_and_told(case, replicated=True)
    # A decode step leaves the two parts of MLA's queries as they are.
    assert taken <= told <= 1.06 * taken


@pytest.mark.parametrize("comm_backend", ["a2a", "ag_rs"])
@pytest.mark.parametrize("shape", [GQA, PADDED._replace(q_heads=48), MLA], ids=str)
def test_a_step_of_four_ranks_allocates_what_is_told(
    shape: Shape, comm_backend: str
) -> None:
    backends = ("fa3", "flashinfer") if shape.latent else ("fa3", "triton")
    for backend in backends:
        case = Case(backend, shape, dcp_size=4, device="cpu", width=5, max_len=200)
        taken, told = taken_and_told(case, comm_backend)
        assert taken <= told <= 1.05 * taken, name_of(case)


@pytest.mark.parametrize("case", FP8_CASES, ids=name_of)
def test_a_step_over_fp8_allocates_what_is_told(case: Case) -> None:
    taken, told = taken_and_told(case)
    # Of a bfloat16 model FA3's outputs need no copy.
    assert taken <= told <= (1.2 if case.backend == "fa3" else 1.02) * taken


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("shape", [GQA, PADDED, MANY_KV_HEADS], ids=str)
def test_plans_of_triton_take_what_is_told(shape: Shape, width: int) -> None:
    """Where SGLang's backend allocates them: once for graphs, and at each eager step."""
    case, most = Case("triton", shape, device="cpu", width=width, max_len=200), 5
    with serving(case) as (at_work, sizes):
        backend = at_work.rank.backend
        for request, committed in COMMITTED.items():
            at_work.group.served.grow(request, committed)
        with LiveBytes() as of_graphs:
            backend.init_cuda_graph_state(most, most * width)
        steps = [at_work.group.batch(step_of(case))[1] for _ in range(2)]
        with LiveBytes() as eager:
            for batch in steps:
                backend.init_forward_metadata(batch)
    # Lists of slots, each beside the one before, and a few numbers of each request.
    slots = 8 * case.max_len // case.dcp_size
    planned = decode_parts(sizes, most, captured=True)[PLANNED]
    assert 0 <= of_graphs.peak - planned - most * slots <= 100 * most * width + 4096
    told = total(decode_parts(sizes, REQUESTS))
    planned = decode_parts(sizes, REQUESTS)[PLANNED]
    assert told == 2 * planned
    assert told - planned * 0.01 <= eager.peak <= told + 2 * REQUESTS * slots


def test_splits_of_decode_end_at_992_requests() -> None:
    heads = Fa3Heads(16, 1, 576, 512)
    most = decode_split_bytes(heads, 992)
    assert most == decode_split_bytes(heads, 4096) == 109 * heads.split_bytes(992)


def splits_of(sizes: ForwardSizes, keys: int) -> int:
    """What FA3 chooses for a step of one request with so many keys on this rank."""
    rows = sizes.width * sizes.group_heads // sizes.kv_heads
    rope = 64 if sizes.latent else sizes.qk_dim
    tile = fa3_tile(rope, sizes.v_dim)
    return fa3_splits(rows, sizes.kv_heads, keys, rope + sizes.v_dim, tile, causal=True)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("heads", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize(
    "kind",
    [
        QWEN,
        QWEN._replace(kv_heads=4),
        QWEN._replace(qk_dim=64, v_dim=64),
        QWEN._replace(qk_dim=96, v_dim=96),
        LITE,
    ],
    ids=["one-kv-head", "four-kv-heads", "dim64", "dim96", "mla"],
)
def test_splits_of_fa3_are_those_of_all_query_tokens(
    kind: ForwardSizes, heads: int, width: int
) -> None:
    """FA3 chooses by the rows of a request, and allocates for all of the batch."""
    if 2 * heads % kind.kv_heads:
        return
    sizes = kind._replace(heads=heads, width=width)
    rows = width * sizes.group_heads
    most = max(splits_of(sizes, 64 * tiles) for tiles in range(1, 260))
    split = rows * (sizes.v_dim + 1) * 4
    held = rows * (sizes.qk_dim * 2 + sizes.v_dim * 2 + 4)
    for requests in (1, 64, 992):
        taken = requests * (held + (most * split if most > 1 else 0))
        told = total(decode_parts(sizes, requests))
        assert told == max(
            taken, total(decode_parts(sizes._replace(splits=False), requests))
        )


def test_fa3_splits_long_chains_as_is_told() -> None:
    for shape in (GQA, MLA):
        case = Case("fa3", shape, device="cpu", width=3)
        with serving(case) as (at_work, sizes):
            for request in COMMITTED:
                at_work.group.served.grow(request, 1400)
            taken = at_work.peak(step_of(case))
            assert at_work.inner.splits[-1] > 1
        assert taken <= total(decode_parts(sizes, REQUESTS))
        # Longer chains are split more.
        alone = total(decode_parts(sizes._replace(splits=False), REQUESTS))
        assert taken > alone


def test_a_verification_is_told_by_its_requests() -> None:
    """As rows of their own, 512 x 4 query tokens would end at 992, with splits for 1 tile."""
    sizes = LITE._replace(heads=16, width=4)
    folded = Fa3Heads(128, 1, 576, 512)
    rows = Fa3Heads(32, 1, 576, 512)
    assert folded.tiles(1) == 2 * rows.tiles(1) == 2
    parts = decode_parts(sizes, 512)
    assert parts["splits of the kernel"] == decode_split_bytes(folded, 512)
    assert decode_split_bytes(folded, 512) != decode_split_bytes(rows, 512 * 4)


def test_replicated_queries_are_counted_beside_their_copy() -> None:
    """A model hands in the queries of all heads, cut from a wider product."""
    queries = 64 * 16 * 128 * 2
    replicated = decode_parts(QWEN._replace(replicated_q=True, splits=False), 64)
    outputs = 64 * 16 * (128 * 2 + 4)
    assert total(replicated) >= 2 * queries + outputs


def test_no_captured_step_takes_nothing() -> None:
    assert decode_parts(QWEN._replace(planned_outputs=(8, 100)), 0, captured=True) == {}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
