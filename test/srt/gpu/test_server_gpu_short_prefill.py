"""Live servers whose short prefills replay the graph of a decode step.

DCP makes such prefills on GPUs only where they were compared and timed (`SERVED` in
`layers/short_prefill.py`). The plugin of these servers opens the door for the rest, and logs
each step. Only here are the rows of a captured step new tokens of a few requests, padded to
the size of a graph, and between steps of decode. Requests alone are chains, if they have
enough tokens.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence

import pytest

from helpers.gpu_cases import (
    BACKENDS,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    assert_within_spread,
    behind_door,
    chosen_kinds,
    fleet_fixture,
    params,
    rotated,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.needs_sglang import needs_sglang
from helpers.short_prefill_door import chains_in, steps_in
from helpers.teacher_forcing import Prompt, Wave

pytestmark = [
    pytest.mark.server,
    needs_gpus(2),
    needs_sglang("0.5.23", "older releases have no hook for it"),
]

KINDS = ("llama-2kv-d128", "qwen3-moe-d128", "mla-moe-d512", "mla-v3-d512")
MLA_BACKENDS = ("fa3", "flashinfer")
EXCHANGES = tuple(itertools.product(("symm_a2a", "a2a", "ag_rs"), (True, False)))
SHAPES = (
    ("page1", "--page-size 1"),
    ("page64", "--page-size 64"),
    ("page16-mixed", "--page-size 16 --chunked-prefill-size 1024 --enable-mixed-chunk"),
    ("page1-eager-prefill", "--page-size 1 --disable-prefill-cuda-graph"),
)
# Tokens of the prefixes, and new tokens of the turns on them.
PREFIXES = (1, 2, 130, 1023, 4096, 16384)
TURNS = (1, 2, 5, 17, 64)
LAYOUTS = (TP2_DCP2, TP4_ATTN2, TP4_DCP4)


def build_waves(seed: int = 0) -> list[Wave]:
    """Prefixes, turns on each of them alone, and many turns at once on all of them."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(length))

    bases = {length: ids(length) for length in PREFIXES}

    def turn(name: str, prefix: int, new: int) -> Prompt:
        # A prefix of one page or less need not be in the cache.
        shared = prefix if prefix > 128 else 0
        return Prompt(f"{name}-{new}-on-{prefix}", bases[prefix] + ids(new), 9, shared)

    alone = [Prompt(f"base-{n}", base, 8) for n, base in bases.items()]
    alone += [turn("turn", *sizes) for sizes in itertools.product(PREFIXES, TURNS)]
    together: Sequence[Prompt] = [
        turn("together", *sizes) for sizes in itertools.product(PREFIXES, (1, 3, 8))
    ]
    return [*([prompt] for prompt in alone), together]


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        backends = MLA_BACKENDS if kind.startswith("mla") else BACKENDS
        for case in rotated(kind, backends, EXCHANGES, SHAPES, LAYOUTS):
            yield behind_door(case, "short_prefill_door")


fleet = fleet_fixture(build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    # The warm-up is a step too, so the lines of the turns themselves are looked for.
    log = fleet.run(case.spec).log
    assert set(TURNS) <= set(steps_in(log))
    # On these prefixes chains of 1, 2 and 5 tokens are never faster, of 17 sometimes, and of
    # 64 always on the longest.
    assert {64} <= set(chains_in(log)) <= {17, 64}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
