"""Live servers on GPUs in bf16: backends x comm backends x Q widths x models x layouts.

Only here do the 16-bit attention kernels, graph capture and NCCL meet in one server:
batches of 1 to 64, prompts of 1 to 32K tokens, prefix hits, chunked and mixed prefill.
`-k` chooses cases by the words in their names (`-k "tp2dcp2 and fa3"`),
`SGLANG_DCP_TEST_KIND` models, `SGLANG_DCP_TEST_SERVERS` how many servers live at once.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BACKENDS,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    assert_within_spread,
    chosen_kinds,
    exchange_case,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus

pytestmark = [pytest.mark.server, needs_gpus(2)]

KINDS = ("llama-2kv-d128", "llama-8kv-d64", "qwen3-moe-d128")
EXCHANGES = tuple(itertools.product(("ag_rs", "a2a", "symm_a2a"), (False, True)))
# All but the eager one decode in CUDA graphs. Chunks that are no whole pages are cut.
SHAPES = (
    ("page1", "--page-size 1"),
    (
        "page16-mixed",
        "--page-size 16 --chunked-prefill-size 1000 --enable-mixed-chunk",
    ),
    ("page64", "--page-size 64"),
    ("eager", "--page-size 1 --disable-cuda-graph --chunked-prefill-size 2000"),
)


def matrix(kind: str) -> Iterator[Case]:
    """Each backend with each exchange on 2 and on 4 ranks.

    The shapes rotate, so that each backend and each exchange sees them all.
    """
    for b, backend in enumerate(BACKENDS):
        for e, exchange in enumerate(EXCHANGES):
            # On each backend DCP 4 has both comm backends and both Q widths.
            wide = TP4_DCP4 if (e % 3 == 0) == (b % 2 == 0) else TP4_ATTN2
            for layout, turn in ((TP2_DCP2, b + e), (wide, b + e + 2)):
                shape = SHAPES[turn % len(SHAPES)]
                yield exchange_case(kind, layout, backend, exchange, shape)


def experts(kind: str) -> Iterator[Case]:
    """MoE layers over expert groups; `--ep-size` 1 is what the matrix has."""
    if not kind.startswith("qwen3-moe"):
        return
    for layout, ep_size, backend, comm in (
        (TP2_DCP2, 2, "fa3", "a2a"),
        (TP2_DCP2, 2, "flashinfer", "a2a"),
        (TP2_DCP2, 2, "triton", "ag_rs"),
        (TP4_ATTN2, 2, "fa3", "ag_rs"),
        (TP4_ATTN2, 4, "triton", "a2a"),
        (TP4_DCP4, 4, "flashinfer", "a2a"),
    ):
        yield Case(
            kind,
            layout,
            f"{backend}-{comm}-ep{ep_size}",
            f"--attention-backend {backend} --ep-size {ep_size} "
            + exchange_flags(comm, replicated=comm == "a2a"),
        )


# SGLang 0.5.16's own DCP gets the first token of each reply right here, and no other one.
MEASURED_FAILURE = Case(
    "llama-2kv-d128", TP2_DCP2, "measured-failure", "--attention-backend triton"
)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        yield from matrix(kind)
        yield from experts(kind)
        if kind == MEASURED_FAILURE.kind:
            yield MEASURED_FAILURE


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
