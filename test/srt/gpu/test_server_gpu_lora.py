"""Live servers on GPUs with LoRA adapters: the bf16 file's requests, by several adapters.

Only here do the GPU kernels of adapters meet DCP attention, NCCL, `symm_a2a` and decode in
CUDA graphs. One batch holds requests of three adapters and of none. Two adapters are there
at start, and the third comes at run time. Plain servers have the same adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BACKENDS,
    TP2_DCP2,
    TP4_ATTN2,
    Case,
    Numbers,
    assert_within_spread,
    chosen_kinds,
    fleet_fixture,
    params,
    rotated,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.demo.client import Reply

pytestmark = [pytest.mark.server, needs_gpus(2)]

KINDS = ("llama-2kv-d128",)
ADAPTERS = ("all", "some", "late")
LORA = Numbers(
    "lora",
    # A place for each adapter and for none, so that all requests decode in one batch.
    "--dtype bfloat16 --max-loras-per-batch 4 --lora-paths all=@lora_all some=@lora_some",
    loads=(("late", "lora_late"),),
)
# Q stays sharded: an adapter is refused beside a replicated Q.
EXCHANGES = (("a2a", False), ("symm_a2a", False))
SHAPES = (
    ("page1", "--page-size 1"),
    (
        "page16-mixed",
        "--page-size 16 --chunked-prefill-size 1024 --enable-mixed-chunk",
    ),
    ("page64", "--page-size 64"),
)
# What an adapter moves at least. Two servers of one adapter are nearer by far.
MOVED = 0.2


def waves() -> Sequence[teacher_forcing.Wave]:
    return teacher_forcing.with_adapters(teacher_forcing.build_waves(), ADAPTERS)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        for case in rotated(kind, BACKENDS, EXCHANGES, SHAPES, (TP2_DCP2, TP4_ATTN2)):
            yield replace(case, numbers=LORA)


def moved(replies: dict[str, Reply], adapter: str) -> float:
    """How far an adapter is from none, over the same forced tokens."""
    got, base = ({"same": replies[f"same-{name}"]} for name in (adapter, None))
    return teacher_forcing.distance(got, base).mean


fleet = fleet_fixture(waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    replies: dict[str, Reply] = {**fleet.run(case.spec).replies}
    assert all(moved(replies, adapter) > MOVED for adapter in ADAPTERS)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
