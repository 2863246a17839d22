"""Live servers of several launches: "nodes" on this machine that meet over loopback.

Only here do ranks of two launches make one world: DCP groups inside a node and across
both, nodes that come late, die, or were given flags that do not fit together.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest

from helpers import request_set
from helpers.nodes import launched_nodes, logs, nodes
from helpers.servers import READY_SECONDS, everything_of, server, title
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.server
long = pytest.mark.long

INSIDE = "each DCP group of 2 ranks lies inside a node"
ACROSS = "DCP groups of {} ranks lie across nodes"
# Within the watchdog's default of 300 s.
END_S = 180
# It must leave time for the first forward: 0.5.16 compiles a kernel in it.
WATCHDOG = "--watchdog-timeout 60"
TINY = "--max-total-tokens 512"


@dataclass(frozen=True)
class Case:
    """Two nodes. `late` is the one that starts 20 s after the other."""

    kind: str
    flags: str
    attn_tp_size: int
    dcp_size: int
    says: str
    late: int | None = None


CASES = {
    "llama-2kv-tp2-dcp2-across-a2a": Case(
        "llama-2kv",
        "--tp 2 --attn-tp-size 1 --dcp-comm-backend a2a --chunked-prefill-size 64",
        1,
        2,
        ACROSS.format(2),
    ),
    "llama-2kv-tp4-dcp2-inside-a2a-replicated": Case(
        "llama-2kv",
        "--tp 4 --attn-tp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        2,
        2,
        INSIDE,
    ),
    "llama-2kv-tp4-dcp4-across-ag_rs-late-node-1": Case(
        "llama-2kv",
        "--tp 4 --attn-tp-size 1 --page-size 2",
        1,
        4,
        ACROSS.format(4),
        late=1,
    ),
    "mla-moe-tp4-dcp2-inside-ag_rs": Case(
        "mla-moe", "--tp 4 --attn-tp-size 2 --chunked-prefill-size 64", 2, 2, INSIDE
    ),
    "mla-moe-tp4-dcp4-across-a2a-replicated-late-node-0": Case(
        "mla-moe",
        "--tp 4 --attn-tp-size 1 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        1,
        4,
        ACROSS.format(4),
        late=0,
    ),
}
SHORT = "llama-2kv-tp2-dcp2-across-a2a"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a kind, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(root / kind, kind)


@pytest.fixture(scope="module")
def reference(models: Callable[[str], Path]) -> Callable[[str], list[Reply]]:
    """What tp 1 without DCP flags answers to the request set, once a kind."""
    answers: dict[str, list[Reply]] = {}

    def answer(kind: str) -> list[Reply]:
        if kind not in answers:
            flags = "--tp 1 --attention-backend torch_native --max-total-tokens 4096"
            with server(models(kind), flags) as tp1:
                answers[kind] = request_set.run_requests(
                    tp1.base_url, request_set.build_requests()
                )
        return answers[kind]

    return answer


@pytest.fixture
def model(models: Callable[[str], Path]) -> Path:
    return models("llama-2kv")


def marked(name: str) -> object:
    return pytest.param(CASES[name], id=name, marks=() if name == SHORT else long)


@pytest.mark.parametrize("case", map(marked, CASES))
def test_equal_to_tp1(
    case: Case,
    models: Callable[[str], Path],
    reference: Callable[[str], list[Reply]],
) -> None:
    requests = request_set.build_requests()
    want = reference(case.kind)
    flags = f"{case.flags} --max-total-tokens 4096 --enable-metrics"
    with ExitStack() as stack:
        pair = launched_nodes(models(case.kind), flags)
        order = (0, 1) if case.late == 1 else (1, 0)
        for place, rank in enumerate(order):
            if place and case.late is not None:
                time.sleep(20)
            stack.enter_context(pair[rank])
        pair[0].wait_ready(READY_SECONDS)
        replies = request_set.run_requests(pair[0].base_url, requests)
        info = http_json(f"{pair[0].base_url}/server_info")
        only_node_0_serves(pair[1])
        said = logs(pair)
    request_set.assert_equal_to_reference(requests, replies, want)
    (state,) = info["internal_states"]
    for seen in (info, state):
        sizes = (seen["attn_tp_size"], seen["dcp_size"])
        assert sizes == (case.attn_tp_size, case.dcp_size)
    assert info["max_total_num_tokens"] == 4096 * case.dcp_size
    per_node = case.attn_tp_size * case.dcp_size // 2
    for rank, log in enumerate(said):
        assert (
            log.count(f"DCP: node {rank} of 2 with {per_node} ranks; {case.says}") == 1
        )
        assert "leak" not in log.lower()
    assert [log.count("DCP layout: ") for log in said] == [1, 0]
    print(f"max |d logprob| {request_set.max_difference(replies, want):.2e}")


def only_node_0_serves(node_1: ServerProcess) -> None:
    """The other node tells its health, and nothing else."""
    with pytest.raises(HTTPError) as caught:
        http_json(f"{node_1.base_url}/server_info")
    assert caught.value.code == 404


@long
@pytest.mark.parametrize(
    ("killed", "at_work"),
    [(0, False), (1, False), (1, True)],
    ids=["node-0-idle", "node-1-idle", "node-1-at-work"],
)
def test_a_killed_node_ends_the_other(killed: int, at_work: bool, model: Path) -> None:
    flags = "--tp 2 --dcp-size 2 --max-total-tokens 4096"
    with nodes(model, flags) as pair:
        busy = threading.Thread(target=ask_for_ever, args=(pair[0].base_url,))
        if at_work:
            busy.start()
            time.sleep(3)
        for process in everything_of(pair[killed]):
            process.kill()
        code = pair[1 - killed].wait_exit(END_S)
        said = logs(pair)[1 - killed]
        if at_work:
            busy.join(END_S)
    assert code != 0
    assert "Scheduler hit an exception" in said and "onnection" in said, said[-3000:]


@long
def test_a_dead_rank_ends_both_nodes(model: Path) -> None:
    flags = "--tp 2 --dcp-size 2 --max-total-tokens 4096"
    with nodes(model, flags) as pair:
        busy = threading.Thread(target=ask_for_ever, args=(pair[0].base_url,))
        busy.start()
        time.sleep(3)
        [rank] = [p for p in everything_of(pair[1]) if "scheduler_TP1" in title(p)]
        rank.send_signal(signal.SIGKILL)
        for node in pair:
            node.wait_exit(END_S)
        busy.join(END_S)
        said = logs(pair)
    assert "Scheduler hit an exception" in said[0]
    assert "terminated with -9" in said[1], said[1][-3000:]


@long
def test_the_watchdog_ends_a_node_whose_peer_stalls(model: Path) -> None:
    """As where a host is lost: its connections stay open, and nothing comes."""
    flags = f"--tp 2 --dcp-size 2 --max-total-tokens 4096 {WATCHDOG}"
    with nodes(model, flags) as pair:
        busy = threading.Thread(target=ask_for_ever, args=(pair[0].base_url,))
        busy.start()
        time.sleep(3)
        for process in everything_of(pair[1]):
            process.suspend()
        pair[0].wait_exit(END_S)
        busy.join(END_S)
        said = logs(pair)[0]
    assert "watchdog timeout" in said, said[-3000:]


@dataclass(frozen=True)
class Wrong:
    """Flags of each node that do not fit together, and what the log of each must say."""

    own: tuple[str, str]
    says: tuple[str, str]


DIFFERENT = "is a2a on node 0 and ag_rs on node 1; give all nodes the same flags"
NOT_MET = "--node-rank 0: the ranks of --nnodes 2 did not meet at 127.0.0.1:"
SILENT = "ranks {} named no layout: they have no DCP flags, or ended; give all nodes"
# What SGLang says where ranks of the other node have ended.
GONE = "Scheduler hit an exception"
WRONG = {
    "comm-backends": Wrong(
        ("--dcp-size 2 --dcp-comm-backend a2a", "--dcp-size 2"),
        (DIFFERENT, DIFFERENT),
    ),
    "dcp-on-node-0-alone": Wrong(
        ("--dcp-size 2", "--attention-backend torch_native"),
        (SILENT.format(1), GONE),
    ),
    "dcp-on-node-1-alone": Wrong(
        ("--attention-backend torch_native", "--dcp-size 2"),
        (GONE, SILENT.format(0)),
    ),
    "two-nodes-0": Wrong(
        ("--dcp-size 2", "--dcp-size 2 --node-rank 0"), (NOT_MET, "EADDRINUSE")
    ),
    "node-2-of-2": Wrong(
        ("--dcp-size 2", "--dcp-size 2 --node-rank 2"),
        (NOT_MET, "--node-rank 2 of --nnodes 2 does not work with DCP"),
    ),
}


@long
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_nodes_that_do_not_fit_together_end(wrong: Wrong, model: Path) -> None:
    with ExitStack() as stack:
        pair = [
            stack.enter_context(node)
            for node in launched_nodes(model, f"--tp 2 {TINY} {WATCHDOG}", wrong.own)
        ]
        codes = [node.wait_exit(READY_SECONDS) for node in pair]
        said = logs(pair)
    assert 0 not in codes
    for log, wanted in zip(said, wrong.says):
        assert wanted in log, log[-3000:]
        assert "Load weight begin" not in log or wanted == GONE


def ask_for_ever(base_url: str) -> None:
    """Keep the server at work until it is gone."""
    sampling = {"max_new_tokens": 4000, "ignore_eos": True, "temperature": 0}
    payload = {"input_ids": [65] * 40, "sampling_params": sampling}
    try:
        http_json(f"{base_url}/generate", payload, timeout=END_S)
    except (URLError, OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
