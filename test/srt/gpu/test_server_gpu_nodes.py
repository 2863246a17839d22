"""Live servers of two launches on GPUs of one machine, which NCCL treats as two hosts.

Only here do DCP groups cross nodes in CUDA graphs: NCCL goes over sockets there, and
`symm_a2a` must find out that it cannot serve, on all ranks alike and without a wait.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers import teacher_forcing
from helpers.generate import generate
from helpers.gpu_cases import (
    BF16,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    Layout,
    assert_within_spread,
    chosen_kinds,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_nodes import FirstNode
from helpers.gpu_servers import Fleet, Spec, live, make_server
from helpers.nccl_ranks import needs_gpus

pytestmark = [pytest.mark.server, needs_gpus(2)]

GQA, MLA = "llama-2kv-d128", "mla-moe-d512"
# Not only between nodes, but also between the GPUs of each.
NO_P2P = (("NCCL_P2P_DISABLE", "1"),)
SAID = "; a2a takes over for all batches"
WATCHDOG_S = 60


def nodes_case(
    kind: str,
    layout: Layout,
    comm: str,
    *,
    replicated: bool = False,
    in_use: str = "",
    label: str = "",
    more: str = "",
    env: tuple[tuple[str, str], ...] = (),
) -> Case:
    width = "replicated" if replicated else "gathered"
    flags = exchange_flags(comm, replicated=replicated)
    return Case(
        kind,
        layout,
        f"nodes2-{comm}-{width}{label}",
        f"--attention-backend fa3 {flags} {more}",
        env=env,
        nodes=2,
        in_use=in_use,
    )


def cases() -> Iterator[Case]:
    for kind in chosen_kinds((GQA, MLA)):
        # One GPU a node, so each DCP group crosses nodes.
        yield nodes_case(
            kind, TP2_DCP2, "a2a", replicated=True, label="-no-p2p", env=NO_P2P
        )
        yield nodes_case(kind, TP2_DCP2, "ag_rs")
        yield nodes_case(kind, TP2_DCP2, "symm_a2a", in_use="a2a")
        # Two GPUs a node: groups inside, then across.
        yield nodes_case(kind, TP4_ATTN2, "symm_a2a", replicated=True)
        yield nodes_case(kind, TP4_ATTN2, "a2a", label="-no-p2p", env=NO_P2P)
        yield nodes_case(kind, TP4_DCP4, "a2a", replicated=True)
        yield nodes_case(kind, TP4_DCP4, "symm_a2a", in_use="a2a", replicated=True)
    yield nodes_case(
        GQA, TP2_DCP2, "a2a", label="-eager", more="--disable-cuda-graph --page-size 16"
    )


fleet = fleet_fixture(teacher_forcing.build_waves)


@pytest.mark.parametrize("case", params(cases()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    run = fleet.run(case.spec)
    inside = case.layout.tp_size // case.nodes % case.layout.dcp_size == 0
    where = "lies inside a node" if inside else "ranks lie across nodes"
    assert run.log.count(where) == 1
    # One line of the one group across both, and none where symm_a2a serves.
    assert run.log.count(SAID) == int(bool(case.in_use))
    if case.in_use:
        assert "call different GPUs GPU 0" in run.log
    assert_within_spread(case, fleet)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_node_ends_the_other(killed: int, tmp_path: Path) -> None:
    """While it decodes in CUDA graphs. The watchdog may be what notices."""
    spec = Spec(
        f"killed-{killed}",
        GQA,
        f"{BF16.flags} --tp 2 --dcp-size 2 --attention-backend fa3 "
        f"--dcp-comm-backend a2a --watchdog-timeout {WATCHDOG_S}",
        nodes=2,
    )
    with live(spec, tmp_path) as server:
        assert isinstance(server, FirstNode)
        pair = (server, *server.others)
        busy = threading.Thread(target=_decode, args=(server.base_url,), daemon=True)
        busy.start()
        time.sleep(5)
        process = pair[killed]._process
        assert process is not None
        leader = psutil.Process(process.pid)
        for one in (leader, *leader.children(recursive=True)):
            one.send_signal(signal.SIGKILL)
        pair[1 - killed].wait_exit(3 * WATCHDOG_S)
        log = pair[1 - killed].log_path.read_text(errors="replace")
    reasons = ("Scheduler hit an exception", "watchdog timeout", "crashed with exit")
    assert any(reason in log for reason in reasons), log[-3000:]


def _decode(base_url: str) -> None:
    try:
        generate(base_url, [65] * 40, 30000)
    except (OSError, ValueError):
        return


def test_a_node_of_other_flags_ends_both(tmp_path: Path) -> None:
    """The two would make groups of other shapes, or merge by other log bases."""
    spec = Spec(
        "differ",
        GQA,
        f"{BF16.flags} --tp 2 --dcp-size 2 --dcp-comm-backend a2a",
        nodes=2,
    )
    server = make_server(spec, tmp_path)
    assert isinstance(server, FirstNode)
    backends = ("fa3", "flashinfer")
    pair = (server, *server.others)
    for node, backend in zip(pair, backends):
        node.command += ["--attention-backend", backend]
    with server:
        for node in pair:
            node.wait_exit(300)
        logs = [node.log_path.read_text(errors="replace") for node in pair]
    for log in logs:
        assert "--attention-backend is fa3 on node 0 and flashinfer on node 1" in log


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
