"""`symm_a2a` beside another user of PyTorch's symmetric memory, `--enable-torch-symm-mem`.

Both map memory in the same processes, in groups of other sizes and one after the other.
Only this file sees a rendezvous that meets what the other one left in the store, or
buffers that overlap. The file is its own worker.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import symm_cases as cases
from helpers import teacher_forcing
from helpers.gloo_ranks import Outcomes, fault_of
from helpers.gpu_cases import (
    TP2_DCP2,
    Case,
    assert_within_spread,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus, ranks_fixture, run_rank
from helpers.symm_layers import Batch
from helpers.symm_ranks import SPEC
from sglang_dcp.distributed.exchange import create_exchange

WORLDS = (2, 4)
STARTS = 3
ELEMENTS = 4096


def body(group: Any) -> Outcomes:
    for start in range(STARTS):
        yield f"start{start}", fault_of(partial(check_both, group))


def check_both(group: Any) -> None:
    """Map for PyTorch's all-reduce, map for the exchange, then use both by turns."""
    from torch.distributed import _symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    buffer = symmetric.empty(ELEMENTS, dtype=torch.bfloat16, device=device)
    name = group.device_group.group_name
    symmetric.rendezvous(buffer, name)
    exchange = create_exchange("symm_a2a", group, SPEC)
    assert exchange.in_use == "symm_a2a", exchange.fallbacks.counts
    batch = Batch(group, exchange, (8, 4, 128))
    generator = torch.Generator("cuda").manual_seed(4)
    total = sum(range(1, group.world_size + 1))
    for turn in range(50):
        buffer.fill_(turn % 3 * (group.rank_in_group + 1))
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
        error = batch.worst(generator, batch.call)
        assert error.item() < cases.ROUNDING["bf16"]
        assert buffer.eq(turn % 3 * total).all()


ranks_of = ranks_fixture(__file__)


@pytest.mark.parametrize(
    "world_size", [pytest.param(n, marks=needs_gpus(n), id=f"dcp{n}") for n in WORLDS]
)
@pytest.mark.parametrize("start", range(STARTS))
def test_both_users_share_a_process(start: int, world_size: int, ranks_of: Any) -> None:
    ranks_of(world_size).assert_passed(f"start{start}")


def server_case(start: int) -> Case:
    return Case(
        "llama-2kv-d128",
        TP2_DCP2,
        f"fa3-symm_a2a-beside-torch-symm-mem-start{start}",
        # SGLang would prefer its custom all-reduce to PyTorch's.
        "--attention-backend fa3 --page-size 1 --enable-torch-symm-mem "
        "--disable-custom-all-reduce " + exchange_flags("symm_a2a", replicated=True),
    )


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.server
@pytest.mark.parametrize("case", params(map(server_case, range(STARTS))))
def test_servers_with_both_start_and_answer(case: Case, fleet: Fleet) -> None:
    """Three starts: what a rendezvous leaves behind may hang the next one only.

    Without NVLink multicast, SGLang maps its buffer and then uses NCCL.
    """
    assert_within_spread(case, fleet)
    unused = "multicast operations are not supported" in fleet.run(case.spec).log
    print(f"{case.name}: PyTorch's all-reduce {'was not used' if unused else 'ran'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(run_rank(body, Path(sys.argv[2])))
    sys.exit(pytest.main([__file__, "-s"]))
