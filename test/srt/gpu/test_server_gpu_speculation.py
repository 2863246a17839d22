"""Live servers on GPUs that speculate: DCP = plain speculation, with SGLang's own workers.

Only here do verifications meet the 16-bit kernels, their plans and CUDA graphs, the overlap
scheduler and the exchanges over NCCL and NVLink. Drafts are right or wrong as the test says:
NGRAM's corpus is replaced by one that knows the forced tokens. A draft that is wrong and
stays readable, or a row that sees too much, moves log-probabilities by whole units.

A draft model is measured by how many of its tokens are accepted, beside plain tp. If it is
the target itself, these are most of them: SGLang hides the first token of a prompt from a
draft. Without its own exchange there would be hardly any.

The plugin opens these servers, which DCP refuses otherwise.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import mean

import pytest

from helpers import speculation, teacher_forcing
from helpers.generate import generate_together
from helpers.gpu_cases import (
    BF16,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    Layout,
    Numbers,
    assert_within_spread,
    chosen_kinds,
    exchange_case,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet, Spec, live
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.releases.installed import in_range, sglang_version

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    needs_gpus(2),
    pytest.mark.skipif(
        not in_range(sglang_version(), "0.5.23", None),
        reason="DCP serves the speculation of SGLang 0.5.23 on",
    ),
]

GQA_KINDS = ("llama-2kv-d128", "llama-8kv-d64")
MLA_KINDS = ("mla-v3-d512",)
EXCHANGES = (
    ("symm_a2a", True),
    ("a2a", False),
    ("ag_rs", True),
    ("symm_a2a", False),
    ("a2a", True),
)
SHAPES = (
    ("page1", "--page-size 1"),
    ("page64", "--page-size 64 --chunked-prefill-size 1000"),
    ("eager", "--page-size 1 --disable-cuda-graph --chunked-prefill-size 2000"),
    ("page16-no-overlap", "--page-size 16 --disable-overlap-schedule"),
)


def chain(algorithm: str, width: int) -> str:
    return (
        f"--speculative-algorithm {algorithm} --speculative-num-steps {width - 1} "
        f"--speculative-num-draft-tokens {width}"
    )


def drafts(right: str, width: int) -> Numbers:
    """Servers whose corpus gives `width` - 1 drafts of which these are right."""
    flags = f"{chain('NGRAM', width)} --speculative-ngram-max-bfs-breadth 1"
    known = speculation.knowing(right, star=False)
    return Numbers(
        f"bf16-{right}-of-{width}",
        f"--dtype bfloat16 {flags}",
        plain_env=tuple(known.items()),
        source=speculation.FORCED,
    )


# How many drafts are right, and how many query tokens a verification has.
DRAFTS = (("some", 4), ("none", 2), ("all", 4), ("some", 8))


def verified(
    kind: str, layout: Layout, backend: str, turn: int, exchange: tuple[str, bool]
) -> Case:
    right, width = DRAFTS[turn % len(DRAFTS)]
    shape = SHAPES[turn % len(SHAPES)]
    case = exchange_case(kind, layout, backend, exchange, shape)
    env = {speculation.SERVED: "NGRAM", **speculation.knowing(right)}
    label = f"{case.label}-{right}-of-{width}"
    return replace(
        case, label=label, numbers=drafts(right, width), env=tuple(env.items())
    )


def cases() -> Iterator[Case]:
    """Backends, exchanges, shapes and drafts take turns, so that each meets the others."""
    for kind in chosen_kinds((*GQA_KINDS, *MLA_KINDS)):
        backends = ("fa3", "flashinfer", "triton")[: 2 if kind in MLA_KINDS else 3]
        exchanges = cycle(EXCHANGES)
        for b, backend in enumerate(backends):
            for turn in range(b, b + len(DRAFTS)):
                yield verified(kind, TP2_DCP2, backend, turn, next(exchanges))
            for layout in (TP4_ATTN2, TP4_DCP4):
                yield verified(kind, layout, backend, b, next(exchanges))


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_plain_speculation(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)
    plain, _ = case.plain
    ours, theirs = (accepted(fleet.run(spec).log) for spec in (case.spec, plain))
    print(f"{case.name}: mean accepted length {ours:.3f}, plain tp 1 {theirs:.3f}")
    # The same drafts for the same forced tokens; batches may be cut otherwise.
    assert abs(ours - theirs) < 0.05 * theirs


def accepted(log: str) -> float:
    """Mean accepted length of the decode batches, each one in the log."""
    found = re.findall(r"#running-req: (\d+),.*accept len: ([\d.]+)", log)
    requests = sum(int(size) for size, _ in found)
    return sum(int(size) * float(length) for size, length in found) / requests


STANDALONE = f"{chain('STANDALONE', 4)} --speculative-eagle-topk 1"


def draft_specs(case: Case, seed: int) -> tuple[Spec, Spec]:
    """A DCP server and plain tp 2 whose draft is the target (seed 0) or a stranger."""
    flags = f"{STANDALONE} --speculative-draft-model-path @seed{seed}"

    def drafting(spec: Spec) -> Spec:
        return replace(
            spec,
            name=f"{spec.name}-draft{seed}",
            flags=f"{spec.flags} {flags}",
            plugin=speculation.DOOR,
            env=((speculation.SERVED, "STANDALONE"),),
        )

    return drafting(case.spec), drafting(BF16.plain(case.kind, 2))


DRAFTED = [
    Case(
        kind,
        TP2_DCP2,
        f"{backend}-{comm}-drafted",
        f"--attention-backend {backend} --page-size 16 "
        + exchange_flags(comm, replicated=replicated),
    )
    for kind, backend, comm, replicated in (
        ("llama-2kv-d128", "fa3", "symm_a2a", True),
        ("llama-2kv-d128", "flashinfer", "a2a", False),
        ("llama-8kv-d64", "triton", "ag_rs", True),
        ("mla-v3-d512", "fa3", "symm_a2a", False),
        ("mla-v3-d512", "flashinfer", "a2a", True),
    )
]


@pytest.mark.parametrize("seed", [0, 1], ids=["itself", "stranger"])
@pytest.mark.parametrize("case", params(DRAFTED))
def test_as_many_drafts_accepted_as_by_plain_tp(
    case: Case, seed: int, tmp_path: Path
) -> None:
    draw = random.Random(2)
    lens = (1, 2, 3, 30, 64, 90, 700, 2100)
    prompts = [[draw.randrange(256) for _ in range(n)] for n in lens]
    lengths = []
    for spec in draft_specs(case, seed):
        with live(spec, tmp_path) as server:
            answers = generate_together(server.base_url, prompts, [96] * len(prompts))
        lengths.append(mean(a.meta["spec_accept_length"] for a in answers))
    ours, theirs = lengths
    print(f"{case.name} draft {seed}: accepted {ours:.3f}, plain tp 2 {theirs:.3f}")
    assert theirs > 1.3 if seed == 0 else theirs < 1.5
    assert abs(ours - theirs) < 0.1 * theirs


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
