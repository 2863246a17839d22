"""Live servers that keep SGLang's prefill graphs: attention with DCP between segments.

`SERVED` in `support/prefill_graphs.py` names the attention backends that passed. Only here
do replayed segments, eager exchanges and prefixes of earlier chunks meet in one server.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    ABSORBED_KIND,
    BACKENDS,
    CAPACITY,
    TP2_DCP2,
    TP4_ATTN2,
    Case,
    assert_within_spread,
    behind_door,
    chosen_kinds,
    exchange_flags,
    fleet_fixture,
    params,
    rotated,
)
from helpers.gpu_servers import Fleet, Run
from helpers.latents_in_graphs_door import BACKENDS as BACKENDS_OF_LATENTS
from helpers.nccl_ranks import needs_gpus
from helpers.prefill_graph import HAS_PREFILL_GRAPHS

pytestmark = [
    pytest.mark.server,
    needs_gpus(2),
    pytest.mark.skipif(
        not HAS_PREFILL_GRAPHS,
        reason="this SGLang captures attention in prefill graphs",
    ),
]

KINDS = ("llama-2kv-d128", "qwen3-moe-d128")
# DCP turns off the graphs of latents until these cases have passed.
LATENTS = ("mla-v3-d512", "mla-moe-d512", ABSORBED_KIND)
EXCHANGES = tuple(itertools.product(("a2a", "symm_a2a"), (False, True)))
MIXED = "--enable-mixed-chunk"
# Both chunks have a graph of their size. SGLang takes `llama-2kv` for a Llama 2 and captures
# no larger one than 4096.
SHAPES = (
    ("page1", "--page-size 1 --chunked-prefill-size 4096"),
    ("page64-chunks", "--page-size 64 --chunked-prefill-size 1024"),
    ("page1-chunks", "--page-size 1 --chunked-prefill-size 1024"),
    ("page64", "--page-size 64 --chunked-prefill-size 4096"),
    ("page16-mixed", f"--page-size 16 --chunked-prefill-size 1024 {MIXED}"),
)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        layouts = TP2_DCP2, TP4_ATTN2
        yield from rotated(kind, BACKENDS, EXCHANGES, SHAPES, layouts, step=2)
        if kind.startswith("qwen3-moe"):
            # Groups of experts whose communicator has captured and eager calls. DCP turns
            # these graphs off until this case has passed.
            flags = "--attention-backend fa3 --ep-size 2 --chunked-prefill-size 4096 "
            flags += exchange_flags("a2a", replicated=False)
            case = Case(kind, TP4_ATTN2, "fa3-a2a-ep2", flags)
            yield behind_door(case, "prefill_graph_door")


def of_latents() -> Iterator[Case]:
    layouts = TP2_DCP2, TP4_ATTN2
    for kind in chosen_kinds(LATENTS):
        for case in rotated(kind, BACKENDS_OF_LATENTS, EXCHANGES, SHAPES[1:], layouts):
            if case.label.endswith(SHAPES[1][0]):
                case = replace(case, env=(CAPACITY,))
            yield behind_door(case, "latents_in_graphs_door")


EAGER = Case("mla-moe-d512", TP2_DCP2, "eager-latents", "--attention-backend fa3")

fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params((*cases(), *of_latents())))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    run = fleet.run(case.spec)
    assert_prefilled_in_graphs(run, mixed=MIXED in case.flags)
    # The form of a prefill is chosen for each replay.
    form = "prefix chunks" if case.env else "in one shot"
    expands = case.kind in LATENTS and case.kind != ABSORBED_KIND
    assert (f"positions, {form}" in run.log) == expands


def assert_prefilled_in_graphs(run: Run, *, mixed: bool) -> None:
    """All prefills but those of one token, which SGLang would pad to four."""
    in_graph, eager = (run.prefill_batches(graph=graph) for graph in (True, False))
    assert any(batch.cached_tokens for batch in in_graph)
    assert any(not batch.cached_tokens for batch in in_graph)
    # The log leaves out the tokens that a mixed batch decodes.
    assert mixed or {batch.new_tokens for batch in eager} <= {1}
    assert "DCP: prefill CUDA graphs kept" in run.log


def test_latents_prefill_eagerly(fleet: Fleet) -> None:
    run = fleet.run(EAGER.spec)
    assert run.prefill_batches(graph=False)
    assert not run.prefill_batches(graph=True)
    assert "DCP: prefill CUDA graphs turned off" in run.log


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
