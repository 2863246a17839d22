"""Live servers with DP attention on GPUs in bf16: a DCP layout in each replica.

Only here do CUDA graphs of replicas with and without requests, DCP exchanges inside a
replica and SGLang's gather and scatter over all ranks meet. With two GPUs there is one
replica, and the tokens of dense layers are scattered over its ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import teacher_forcing
from helpers.generate import flush_cache
from helpers.gpu_cases import (
    MARGIN,
    TAIL_MARGIN,
    Case,
    Layout,
    chosen_kinds,
    exchange_flags,
    params,
)
from helpers.gpu_servers import PER_RANK, Fleet, Run, live, run_fleet, selected
from helpers.nccl_ranks import needs_gpus
from helpers.needs_sglang import needs_sglang
from helpers.teacher_forcing import CountedReply, Wave
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess

pytestmark = [
    pytest.mark.server,
    needs_gpus(2),
    needs_sglang("0.5.23", "DCP refuses DP attention with this SGLang"),
]

KINDS = ("qwen3-moe-d128", "mla-moe-d512")
REPLICAS = "--enable-dp-attention --dp-size 2 --dcp-size 2"
TWO = Layout("tp4dp2dcp2", 4, REPLICAS, 2)
# SGLang takes one replica for none.
ONE = Layout("tp2dp1dcp2", 2, "--enable-dp-attention --dp-size 1 --dcp-size 2", 2)
# SGLang divides the number by that of replicas. One of them gets 64 requests at once.
ROOM = "--max-running-requests 144"
# By replica, the prompts of a wave that it gets.
Plan = Mapping[int, slice]
ALL = slice(None)
PLANS: tuple[Plan, ...] = (
    {0: ALL},
    {1: ALL},
    {0: slice(0, None, 2), 1: slice(1, None, 2)},
)


def cases() -> Iterator[Case]:
    for kind in chosen_kinds(KINDS):
        latent = kind.startswith("mla")
        for backend, exchange, more in (
            ("fa3", ("a2a", False), "--page-size 64"),
            ("fa3", ("symm_a2a", True), "--page-size 1 --enable-dp-lm-head"),
            ("flashinfer", ("symm_a2a", False), "--page-size 16 --enable-mixed-chunk"),
            (
                "flashinfer",
                ("ag_rs", True),
                "--page-size 1 --chunked-prefill-size 4000",
            ),
            ("fa3", ("a2a", True), "--page-size 1 --disable-cuda-graph"),
            *((("triton", ("a2a", False), "--page-size 1"),) if not latent else ()),
            *((("fa3", ("a2a", False), "--moe-dense-tp-size 1"),) if latent else ()),
        ):
            comm, replicated = exchange
            label = f"{backend}-{comm}-{'replicated' if replicated else 'gathered'}"
            label += more.replace(" --", "-").replace("--", "-").replace(" ", "")
            flags = f"--attention-backend {backend} {more} {ROOM} "
            flags += exchange_flags(comm, replicated=replicated)
            yield Case(kind, TWO, label, flags)
        dense = "--moe-dense-tp-size 1 " if latent else ""
        flags = f"--attention-backend fa3 {dense}" + exchange_flags(
            "a2a", replicated=True
        )
        yield Case(kind, ONE, "fa3-a2a-replicated", flags)


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Fleet]:
    """The servers without DCP that measure the chosen cases."""
    chosen = [case for case in selected(request, "case") if case.spec.can_run()]
    specs = [spec for case in chosen for spec in case.plain]
    waves = teacher_forcing.build_waves()
    yield from run_fleet(tmp_path_factory.mktemp("plain"), waves, specs)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, plain: Fleet, tmp_path: Path) -> None:
    tp1, tp2 = (plain.run(spec).replies for spec in case.plain)
    spread = teacher_forcing.distance(tp2, tp1)
    plans = PLANS if case.layout is TWO else PLANS[:1]
    with live(case.spec, tmp_path) as server:
        for plan in plans:
            run = ask(server, plan)
            found = teacher_forcing.distance(run.replies, tp1)
            print(f"{case.name} {sorted(plan)}: |d logprob| {found}; tp 2: {spread}")
            assert found.mean < MARGIN * spread.mean
            assert found.worst < TAIL_MARGIN * spread.worst
            assert found.worst_request < TAIL_MARGIN * spread.worst_request
            check_run(run, case, plan, plain.largest_batch)


def ask(server: ServerProcess, plan: Plan) -> Run:
    """All waves, each prompt by the replica that has it; the log of these steps alone."""
    flush_cache(server.base_url)
    before = server.log_path.stat().st_size
    replies: dict[str, CountedReply] = {}
    with ThreadPoolExecutor(len(plan)) as pool:
        for wave in teacher_forcing.build_waves():
            jobs = [
                pool.submit(ask_replica, server, replica, wave[chosen])
                for replica, chosen in plan.items()
            ]
            for job in jobs:
                replies.update(job.result())
    info = http_json(f"{server.base_url}/server_info")
    log = server.log_path.read_bytes()[before:].decode(errors="replace")
    return Run(replies, info, log)


def ask_replica(
    server: ServerProcess, replica: int, wave: Wave
) -> Mapping[str, CountedReply]:
    if not wave:
        return {}
    return teacher_forcing.ask(server.base_url, [wave], routed_dp_rank=replica)


def check_run(run: Run, case: Case, plan: Plan, largest_batch: int) -> None:
    assert run.info["max_total_num_tokens"] == case.layout.dcp_size * PER_RANK
    states: Sequence[Mapping[str, object]] = run.info["internal_states"]
    assert len(states) == (2 if case.layout is TWO else 1)
    words = case.flags.split()
    comm = words[words.index("--dcp-comm-backend") + 1]
    assert {state["dcp_exchange_in_use"] for state in states} == {comm}
    assert "leak" not in run.log.lower()
    in_graph, eager = (run.decode_batches(graph=graph) for graph in (True, False))
    if case.eager:
        assert not in_graph
    elif len(plan) == 1:
        # The replica without requests replays the same graphs.
        assert max(in_graph) == largest_batch and not eager
    else:
        # One of them may still prefill when the other has all its requests.
        assert largest_batch // 4 < max(in_graph) <= largest_batch // 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
