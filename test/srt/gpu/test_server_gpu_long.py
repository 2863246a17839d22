"""Scenario 4 of public reports on GPUs: prompts about and beyond 131,072 tokens.

Only here do positions pass 2^17, where a 128K-position workspace, a split count or an index
ends, and MLA prefills take their prefix in chunks of SGLang's own size. Decode runs in
graphs. The table of docs/correctness.md names the reports.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest

from helpers.gpu_cases import (
    MARGIN,
    TP2_DCP2,
    TP4_DCP4,
    Case,
    Numbers,
    chosen_kinds,
    exchange_flags,
    fleet_fixture,
    measure,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.teacher_forcing import Prompt, Wave

pytestmark = [pytest.mark.server, needs_gpus(2)]

KINDS = ("llama-2kv-d128", "mla-moe-d512")
LENGTHS = (131071, 131072, 131073, 140000, 200000)
NEW_TOKENS = 64
# Of a rank, so that plain tp 1 holds the longest too. Later flags win.
POSITIONS = 1 << 18
LONG = Numbers(
    "long",
    f"--dtype bfloat16 --max-total-tokens {POSITIONS} --context-length {POSITIONS} "
    f'--json-model-override-args {{"max_position_embeddings":{POSITIONS}}}',
)


def waves() -> list[Wave]:
    """Each alone, the last again, from the cache."""
    draw = random.Random(4)
    prompts = [
        Prompt(f"long-{n}", tuple(draw.randrange(256) for _ in range(n)), NEW_TOKENS)
        for n in LENGTHS
    ]
    last = prompts[-1]
    again = Prompt("again", last.ids, NEW_TOKENS, shared=len(last.ids))
    return [[prompt] for prompt in (*prompts, again)]


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        for layout in (TP2_DCP2, TP4_DCP4):
            for backend in ("fa3", "flashinfer"):
                yield Case(
                    kind,
                    layout,
                    f"{backend}-long",
                    f"--attention-backend {backend} --page-size 16 "
                    + exchange_flags("symm_a2a", replicated=True),
                    LONG,
                )


fleet = fleet_fixture(waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    found, spread = measure(case, fleet)
    assert found.mean < MARGIN * spread.mean
    run = fleet.run(case.spec)
    assert run.info["max_total_num_tokens"] == case.layout.dcp_size * POSITIONS
    assert run.decode_batches(graph=True) and not run.decode_batches(graph=False)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
