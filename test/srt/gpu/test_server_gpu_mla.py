"""Live DeepSeek servers on GPUs in bf16: MLA backends x comm backends x Q widths.

Only here do the MLA kernels, their graphs, DeepSeek's own code around them (absorbed Q,
experts, low-rank Q), its prefill by MHA and NCCL meet in one server. The plain servers
prefill as SGLang does by default: by MHA if a batch has no prefix, or one of 8192 positions
or more.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    ABSORBED_KIND,
    BF16,
    CAPACITY,
    EXPAND_PREFIXES,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    Numbers,
    assert_within_spread,
    chosen_kinds,
    exchange_case,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.distributed.exchange import EXCHANGES

pytestmark = [pytest.mark.server, needs_gpus(2)]

# Without and with a low-rank Q projection; both with experts.
KINDS = ("mla-moe-d512", "mla-v3-d512")
BACKENDS = ("fa3", "flashinfer")
# Their prefill leaves every prefix in place, or is absorbed altogether.
IN_PLACE = "--disable-chunked-prefix-cache"
ABSORBED = "--flashinfer-mla-disable-ragged"
FP16 = Numbers("fp16", "--dtype float16")
# Where any request of a batch has a prefix, be it of one token, new tokens are read back
# from the pool, rounded: so all servers must find the same prefixes, in pages of 2 x 64.
FP8_KV = Numbers(
    "fp8kv",
    "--dtype bfloat16 --kv-cache-dtype fp8_e4m3",
    backend="flashinfer",
    plain_flags="--page-size 128",
)
EXPANDED = Numbers("expanded", "--dtype bfloat16", plain_env=EXPAND_PREFIXES)
# All but the eager one decode in CUDA graphs.
SHAPES = (
    ("page64", "--page-size 64"),
    ("page1", "--page-size 1"),
    (
        "page16-mixed",
        "--page-size 16 --chunked-prefill-size 1000 --enable-mixed-chunk",
    ),
    ("eager", "--page-size 1 --disable-cuda-graph --chunked-prefill-size 2000"),
)


def matrix(kind: str) -> Iterator[Case]:
    """Each backend with each exchange on 2 and on 4 ranks, the shapes in turn."""
    # Four widths a comm backend and four shapes: a turn more, or each meets one alone.
    shapes = cycle(SHAPES + SHAPES[1:])
    for backend in BACKENDS:
        for comm in EXCHANGES:
            for replicated in (False, True):
                wide = TP4_DCP4 if replicated else TP4_ATTN2
                for layout in (TP2_DCP2, wide):
                    exchange = comm, replicated
                    yield exchange_case(kind, layout, backend, exchange, next(shapes))


def others(kind: str) -> Iterator[Case]:
    """Number formats, experts over groups, other ways of prefill, no backend named."""
    for backend, numbers, more in (
        ("fa3", FP16, "--page-size 16"),
        ("flashinfer", FP16, "--page-size 16"),
        ("flashinfer", FP8_KV, "--page-size 64"),
        ("fa3", EXPANDED, "--page-size 16"),
        ("fa3", BF16, "--ep-size 2"),
        ("fa3", BF16, IN_PLACE),
        ("flashinfer", BF16, ABSORBED),
    ):
        yield Case(
            kind,
            TP2_DCP2,
            f"{backend}-a2a-{numbers.name}{more.replace('--', '-').replace(' ', '')}",
            f"--attention-backend {backend} {more} "
            + exchange_flags("a2a", replicated=True),
            numbers,
        )
    for backend in BACKENDS:
        case = exchange_case(kind, TP2_DCP2, backend, ("a2a", False), ("chunks", ""))
        yield replace(case, env=(CAPACITY,))
    yield Case(kind, TP2_DCP2, "default-backend", "--page-size 64", BF16)


def absorbed(kind: str) -> Iterator[Case]:
    """Each exchange once; prefixes stay in place."""
    for layout, exchange, shape in (
        (TP2_DCP2, ("symm_a2a", True), SHAPES[0]),
        (TP2_DCP2, ("ag_rs", False), SHAPES[2]),
        (TP4_DCP4, ("a2a", True), SHAPES[1]),
    ):
        yield exchange_case(kind, layout, "fa3", exchange, shape)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds((*KINDS, ABSORBED_KIND)):
        if kind == ABSORBED_KIND:
            yield from absorbed(kind)
            continue
        yield from matrix(kind)
        yield from others(kind)


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    stays = {IN_PLACE, ABSORBED} & set(case.flags.split())
    expands = case.kind != ABSORBED_KIND and not stays
    log = fleet.run(case.spec).log
    told = re.findall(
        r"DCP prefill by MHA gathers \d+ positions, (in one shot|prefix chunks)", log
    )
    # Of the first that a rank takes.
    form = "prefix chunks" if case.env else "in one shot"
    assert set(told) == ({form} if expands else set())


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
