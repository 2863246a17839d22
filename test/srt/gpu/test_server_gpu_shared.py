"""Live servers whose two ranks share one GPU: what a machine with a single GPU can show.

The attention kernels, pools, plans and DeepSeek's prefill are those of a GPU. Collectives go
over gloo and decode runs eagerly, so CUDA graphs, NCCL and `symm_a2a` need the files for
two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    ONE_GPU,
    TP2_DCP2,
    Case,
    assert_within_spread,
    chosen_kinds,
    exchange_case,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus

pytestmark = [pytest.mark.server, needs_gpus(1)]

CASES = (
    ("llama-2kv-d128", "fa3", ("a2a", False), ("page1", "--page-size 1")),
    ("llama-2kv-d128", "triton", ("ag_rs", True), ("page16", "--page-size 16")),
    ("qwen3-moe-d128", "flashinfer", ("ag_rs", True), ("page64", "--page-size 64")),
    ("mla-moe-d512", "fa3", ("a2a", True), ("page64", "--page-size 64")),
    ("mla-v3-d512", "flashinfer", ("ag_rs", False), ("page1", "--page-size 1")),
)


def cases() -> Iterator[Case]:
    chosen = chosen_kinds({kind for kind, *_ in CASES})
    for kind, backend, exchange, shape in CASES:
        if kind in chosen:
            case = exchange_case(kind, TP2_DCP2, backend, exchange, shape)
            yield replace(case, numbers=ONE_GPU)


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
