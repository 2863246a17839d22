"""DCP servers as cases, each measured against plain tensor parallelism.

In 16 bit, tp 1 and tp 2 already differ. That difference, times a margin, is the tolerance
for a DCP server over the same forced tokens. A wrong head, slot or length moves
log-probabilities by whole units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from helpers import teacher_forcing
from helpers.doors import with_door
from helpers.gpu_servers import PER_RANK, POOL, Fleet, Run, Spec, run_fleet, selected
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.demo.tiny_model import KINDS

BACKENDS = ("fa3", "flashinfer", "triton")
# Of the mean over some 2500 tokens. DCP rounds partial outputs once more than tp does.
MARGIN = 1.5
# Of the one token and the one request that are furthest off: single draws of a long tail.
TAIL_MARGIN = 3.0


@dataclass(frozen=True)
class Numbers:
    """A number format, and what the plain servers that measure it have besides.

    They share the name's servers, so what differs needs another name. `source` is of a
    plugin that forces tokens in another way than usual, in all these servers. They all get
    the adapters of `loads`.
    """

    name: str
    flags: str
    backend: str = "fa3"
    plain_flags: str = ""
    plain_env: tuple[tuple[str, str], ...] = ()
    source: str = ""
    loads: tuple[tuple[str, str], ...] = ()

    @property
    def plugin(self) -> str:
        return self.source or teacher_forcing.PLUGIN

    def plain(self, kind: str, tp_size: int) -> Spec:
        """SGLang without DCP."""
        # As DCP servers of latents do without. In a captured prefill 0.5.23 reads new latents back
        # from the pool, rounded if that is fp8.
        flags = f"--tp {tp_size} --disable-prefill-cuda-graph {self.plain_flags}"
        flags += f" --attention-backend {self.backend}"
        name = f"{kind}-plain-tp{tp_size}-{self.name}"
        return Spec(
            name,
            kind,
            f"{self.flags} {flags}",
            self.plugin,
            env=self.plain_env,
            loads=self.loads,
        )


BF16 = Numbers("bf16", "--dtype bfloat16")
# Plain MLA servers expand any prefix, as ours may, not only those of 8192 positions and more.
EXPAND_PREFIXES = (("SGLANG_CHUNKED_PREFIX_CACHE_THRESHOLD", "0"),)
# Heads of other sizes than our prefill by MHA takes, and 10 or 5 a rank, which FlashInfer
# does not.
ABSORBED_KIND = "mla-glm-d512"
# An expanded prefill of more positions takes its prefixes in chunks of so many.
CAPACITY = ("SGLANG_MAX_KV_CHUNK_CAPACITY", "700")


@dataclass(frozen=True)
class Layout:
    """How the ranks are cut; `cut` names one of two sizes, the other is implied."""

    name: str
    tp_size: int
    cut: str
    dcp_size: int

    @property
    def flags(self) -> str:
        return f"--tp {self.tp_size} {self.cut}"


TP2_DCP2 = Layout("tp2dcp2", 2, "--dcp-size 2", 2)
TP4_ATTN2 = Layout("tp4attn2", 4, "--attn-tp-size 2", 2)
# Requests of two tokens leave two ranks without a key.
TP4_DCP4 = Layout("tp4dcp4", 4, "--dcp-size 4", 4)


@dataclass(frozen=True)
class Case:
    """One DCP server; `label` and `flags` say what it has beside model and layout.

    `in_use` is the exchange that serves, where it is not the one that `flags` name.
    """

    kind: str
    layout: Layout
    label: str
    flags: str
    numbers: Numbers = BF16
    plugin: str = ""
    pool: str = POOL
    env: tuple[tuple[str, str], ...] = ()
    nodes: int = 1
    in_use: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.layout.name}-{self.label}"

    @property
    def spec(self) -> Spec:
        flags = f"{self.numbers.flags} {self.layout.flags} {self.flags}"
        return Spec(
            self.name,
            self.kind,
            flags,
            self.plugin or self.numbers.plugin,
            self.pool,
            self.env,
            nodes=self.nodes,
            loads=self.numbers.loads,
        )

    @property
    def plain(self) -> tuple[Spec, Spec]:
        """What it is measured against: plain tp 1, and plain tp 2 for the spread."""
        return self.numbers.plain(self.kind, 1), self.numbers.plain(self.kind, 2)

    @property
    def eager(self) -> bool:
        return "--disable-cuda-graph" in f"{self.numbers.flags} {self.flags}"


def exchange_flags(comm: str, *, replicated: bool) -> str:
    return f"--dcp-comm-backend {comm}" + " --dcp-replicate-q-proj" * replicated


def exchange_case(
    kind: str,
    layout: Layout,
    backend: str,
    exchange: tuple[str, bool],
    shape: tuple[str, str],
) -> Case:
    """One of a matrix: `exchange` is comm backend and replicated Q, `shape` name and flags."""
    comm, replicated = exchange
    name, flags = shape
    width = "replicated" if replicated else "gathered"
    return Case(
        kind,
        layout,
        f"{backend}-{comm}-{width}-{name}",
        f"--attention-backend {backend} {flags} "
        + exchange_flags(comm, replicated=replicated),
    )


def rotated(
    kind: str,
    backends: Sequence[str],
    exchanges: Sequence[tuple[str, bool]],
    shapes: Sequence[tuple[str, str]],
    layouts: Sequence[Layout],
    step: int = 1,
) -> Iterator[Case]:
    """Each backend with each exchange and layout, in one shape, `step` on for each layout.

    So each backend and each exchange sees several shapes.
    """
    for b, backend in enumerate(backends):
        for e, exchange in enumerate(exchanges):
            for number, layout in enumerate(layouts):
                shape = shapes[(b + e + step * number) % len(shapes)]
                yield exchange_case(kind, layout, backend, exchange, shape)


def chosen_kinds(known: Iterable[str]) -> list[str]:
    """`known`, or those of them in `SGLANG_DCP_TEST_KIND` (comma-separated)."""
    known = list(known)
    named = os.environ.get("SGLANG_DCP_TEST_KIND")
    if not named:
        return known
    chosen = named.split(",")
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"SGLANG_DCP_TEST_KIND: no model kind {', '.join(unknown)}")
    return [kind for kind in known if kind in chosen]


def behind_door(case: Case, *doors: str) -> Case:
    """The case with servers that open `doors`, modules of `helpers`, in that order."""
    plugin = case.plugin or case.numbers.plugin
    for door in doors:
        plugin = with_door(plugin, door)
    return replace(case, plugin=plugin)


def params(cases: Iterable[Case]) -> list[object]:
    """For `pytest.mark.parametrize`: named, skipped where GPUs are too few."""
    return [
        pytest.param(case, id=case.name, marks=marks_of(case.spec)) for case in cases
    ]


def marks_of(spec: Spec) -> list[pytest.MarkDecorator]:
    """Skip where its server cannot run."""
    why = spec.needs_own_gpus
    own = pytest.mark.skipif(bool(why), reason=f"needs a GPU for each rank: {why}")
    return [needs_gpus(spec.gpus), own]


def servers_of(cases: Iterable[Case]) -> list[Spec]:
    """What the cases that can run here need, the plain servers before their cases."""
    runnable = [case for case in cases if case.spec.can_run()]
    return [spec for case in runnable for spec in (*case.plain, case.spec)]


def fleet_fixture(waves: Callable[[], Sequence[teacher_forcing.Wave]]) -> Any:
    """A module's `fleet`: the servers of its chosen cases, each asked `waves()`."""

    @pytest.fixture(scope="module")
    def fleet(
        tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
    ) -> Iterator[Fleet]:
        specs = servers_of(selected(request, "case"))
        yield from run_fleet(tmp_path_factory.mktemp("fleet"), waves(), specs)

    return fleet


def distance_from_tp2(case: Case, fleet: Fleet) -> teacher_forcing.Distance:
    """Distance of the DCP server from plain tp 2.

    It tells more than `measure` where plain tp 2 itself is far from plain tp 1.
    """
    tp2 = fleet.run(case.plain[1]).replies
    return teacher_forcing.distance(fleet.run(case.spec).replies, tp2)


def measure(
    case: Case, fleet: Fleet
) -> tuple[teacher_forcing.Distance, teacher_forcing.Distance]:
    """Distance of the DCP server, and of plain tp 2, from plain tp 1; printed.

    So is the distance of the two from each other.
    """
    tp1, tp2 = (fleet.run(spec).replies for spec in case.plain)
    spread = teacher_forcing.distance(tp2, tp1)
    found = teacher_forcing.distance(fleet.run(case.spec).replies, tp1)
    apart = distance_from_tp2(case, fleet)
    print(
        f"{case.name}: |d logprob| {found}; plain tp 2: {spread}; "
        f"ratio {found.mean / spread.mean:.2f} over {found.tokens} tokens; "
        f"from plain tp 2: {apart}"
    )
    return found, spread


def assert_within_spread(case: Case, fleet: Fleet) -> teacher_forcing.Distance:
    """The server ran as the case says, and every token is as near as plain tp 2's.

    Returns the distance of plain tp 2 from plain tp 1.
    """
    _assert_ran_as_meant(case, fleet.run(case.spec), fleet.largest_batch)
    found, spread = measure(case, fleet)
    assert found.mean < MARGIN * spread.mean
    assert found.worst < TAIL_MARGIN * spread.worst
    assert found.worst_request < TAIL_MARGIN * spread.worst_request
    return spread


def _assert_ran_as_meant(case: Case, run: Run, largest_batch: int) -> None:
    assert run.info["max_total_num_tokens"] == case.layout.dcp_size * PER_RANK
    page_size = run.info["page_size"] // case.layout.dcp_size
    words = case.flags.split()
    asked = dict(zip(words, words[1:]))
    backend = run.info["attention_backend"]
    assert asked.get("--attention-backend", backend) == backend
    assert asked.get("--page-size", str(page_size)) == str(page_size)
    comm = case.in_use or asked.get("--dcp-comm-backend", "a2a")
    states = run.info["internal_states"]
    assert [state["dcp_exchange_in_use"] for state in states] == [comm] * len(states)
    assert "leak" not in run.log.lower()
    in_graph, eager = (run.decode_batches(graph=graph) for graph in (True, False))
    assert max(eager if case.eager else in_graph) == largest_batch
    assert not (in_graph if case.eager else eager)
