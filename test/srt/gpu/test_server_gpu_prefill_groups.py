"""Live DeepSeek servers whose prefills keep some prefixes in place and gather others.

DCP makes no such prefill on GPUs until this file has passed there, and `SERVED` in
`layers/mla/groups.py` names the attention backend. The plugin of its servers opens that
door. Only here do both forms of one batch, absorbed weights as SGLang loads them, NCCL and
mixed chunks meet in one server.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from helpers.gpu_cases import (
    CAPACITY,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    assert_within_spread,
    behind_door,
    chosen_kinds,
    exchange_case,
    fleet_fixture,
    params,
    rotated,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.teacher_forcing import Prompt, Wave

pytestmark = [pytest.mark.server, needs_gpus(2)]

# Without and with a low-rank Q projection; both with experts.
KINDS = ("mla-moe-d512", "mla-v3-d512")
BACKENDS = ("fa3", "flashinfer")
EXCHANGES = tuple(itertools.product(("symm_a2a", "a2a", "ag_rs"), (True, False)))
SHAPES = (
    ("page1", "--page-size 1"),
    ("page64-chunks", "--page-size 64 --chunked-prefill-size 4096"),
    ("page16-mixed", "--page-size 16 --chunked-prefill-size 1024 --enable-mixed-chunk"),
)
# Tokens of the prefixes, and new tokens of the turns on them. The last turn is a chunk.
PREFIXES = (130, 1023, 4096, 16384)
TURNS = (1, 5, 17, 64, 3000)
LAYOUTS = (TP2_DCP2, TP4_ATTN2, TP4_DCP4)
LINE = "DCP prefill by group keeps"


def build_waves(seed: int = 0) -> list[Wave]:
    """Prefixes alone, then short and long turns on all of them at once, several times."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(length))

    bases = {length: ids(length) for length in PREFIXES}

    def turns(name: str, long: int) -> list[Prompt]:
        """A long turn on the prefix `long`, or on none, and short ones on all."""
        first = bases.get(long, ()) + ids(TURNS[-1])
        found = [Prompt(f"{name}-long-on-{long}", first, 9, long)]
        for prefix, new in itertools.product(PREFIXES, TURNS[:-1]):
            prompt = bases[prefix] + ids(new)
            # A prefix of one page or less need not be in the cache.
            shared = prefix if prefix > 256 else 0
            found.append(Prompt(f"{name}-{new}-on-{prefix}", prompt, 9, shared))
        return found

    alone = [Prompt(f"base-{n}", base, 8) for n, base in bases.items()]
    together = [turns(f"wave{n}", long) for n, long in enumerate((0, *PREFIXES[1:]))]
    return [*([prompt] for prompt in alone), *together]


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        for case in rotated(kind, BACKENDS, EXCHANGES, SHAPES, LAYOUTS):
            yield behind_door(case, "prefill_groups_door")
    for kind, backend in itertools.product(chosen_kinds(KINDS), BACKENDS):
        case = exchange_case(kind, TP2_DCP2, backend, ("a2a", True), ("chunks", ""))
        yield behind_door(replace(case, env=(CAPACITY,)), "prefill_groups_door")


fleet = fleet_fixture(build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    assert LINE in fleet.run(case.spec).log


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
