"""Live servers whose prefills gather K and V of a cached prefix.

`SERVED` in `layers/prefix/kv_form.py` names the attention backends that passed. Only here do
kernels over gathered rows, NCCL, prefill graphs and prefixes of earlier chunks meet in one
server.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

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
    fleet_fixture,
    params,
    rotated,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.needs_sglang import needs_sglang
from helpers.prefill_graph import HAS_PREFILL_GRAPHS
from sglang_dcp.layers.prefix import kv_form

pytestmark = [
    pytest.mark.server,
    needs_gpus(2),
    needs_sglang(
        kv_form.SERVED_SINCE, "DCP gathers K and V on GPUs with SGLang 0.5.23 on"
    ),
]

KINDS = ("llama-2kv-d128", "qwen3-moe-d128")
EXCHANGES = tuple(itertools.product(("a2a", "symm_a2a", "ag_rs"), (False, True)))
MIXED = "--enable-mixed-chunk"
SHAPES = (
    ("page1", "--page-size 1"),
    ("page64-chunks", "--page-size 64 --chunked-prefill-size 1024"),
    ("page1-chunks", "--page-size 1 --chunked-prefill-size 1024"),
    ("page64", "--page-size 64"),
    ("page16-mixed", f"--page-size 16 --chunked-prefill-size 1024 {MIXED}"),
)
LAYOUTS = (TP2_DCP2, TP4_ATTN2, TP4_DCP4)
LINE = "DCP prefill gathers K and V of"


def eager_cases() -> Iterator[Case]:
    """The other servers prefill in breakable graphs where the release has them."""
    for kind, backend in itertools.product(chosen_kinds(KINDS), BACKENDS):
        case = exchange_case(kind, TP2_DCP2, backend, ("a2a", True), SHAPES[2])
        flags = f"{case.flags} --disable-prefill-cuda-graph"
        yield replace(case, label=f"{case.label}-eager-prefill", flags=flags)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        yield from rotated(kind, BACKENDS, EXCHANGES, SHAPES, LAYOUTS, step=2)
    if HAS_PREFILL_GRAPHS:
        yield from eager_cases()


FP8 = Case(
    "llama-2kv-d128",
    TP2_DCP2,
    "fp8-in-place",
    "--attention-backend fa3 --kv-cache-dtype fp8_e4m3 --chunked-prefill-size 1024",
)

fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    run = fleet.run(case.spec)
    assert LINE in run.log
    if HAS_PREFILL_GRAPHS:
        graph = not case.label.endswith("eager-prefill")
        assert any(batch.cached_tokens for batch in run.prefill_batches(graph=graph))


def test_fp8_stays_in_place(fleet: Fleet) -> None:
    assert LINE not in fleet.run(FP8.spec).log


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
