"""Live servers on GPUs in fp16, and with the KV cache in fp8: the bf16 file's requests.

Each is measured against plain servers of the same number format; those with an fp8 cache
also of the same attention backend, as each backend computes with it in its own way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BACKENDS,
    TP2_DCP2,
    Case,
    Numbers,
    assert_within_spread,
    chosen_kinds,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus

pytestmark = [pytest.mark.server, needs_gpus(2)]

KINDS = ("llama-2kv-d128",)
FP16 = Numbers("fp16", "--dtype float16")


def fp8_kv(backend: str) -> Numbers:
    flags = "--dtype bfloat16 --kv-cache-dtype fp8_e4m3"
    return Numbers(f"fp8kv-{backend}", flags, backend)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        for comm, backend in zip(("a2a", "ag_rs", "a2a"), BACKENDS, strict=True):
            for numbers in (FP16, fp8_kv(backend)):
                yield Case(
                    kind,
                    TP2_DCP2,
                    f"{backend}-{comm}-{numbers.name.split('-')[0]}",
                    f"--attention-backend {backend} --page-size 16 "
                    + exchange_flags(comm, replicated=comm == "a2a"),
                    numbers,
                )


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
