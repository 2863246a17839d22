"""What nodes must have in common, who notices that they have not, and how long one waits.

Only this file sees a fact that nobody compares, and ranks that leave before the others
have read what differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.environ import envs

from helpers.gloo_ranks import run_python
from helpers.gpu_nodes import make_nodes
from helpers.nodes import node_args
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.nodes import (
    Node,
    NodesDisagree,
    check_nodes_agree,
    first_difference,
)
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks.nodes import _facts, node_of, where_groups_lie
from sglang_dcp.layers.short_prefill import SWITCH

WORLD = 4
CONFIG = DcpConfig(Layout(4, 2))
# Another value of each field of the config.
OTHER: dict[str, Any] = {
    "layout": Layout(4, 1),
    "comm_backend": "a2a",
    "replicate_q_proj": True,
    "page_size": 16,
}


def node(rank: int, config: DcpConfig = CONFIG, **changes: Any) -> Node:
    found = node_of(node_args(node_rank=rank, **changes), config)
    assert found is not None
    return found


@pytest.fixture
def stores() -> Iterator[list[Any]]:
    """One client for each rank of a store that rank 0 has."""
    from torch.distributed import TCPStore

    server = TCPStore(
        "127.0.0.1", 0, WORLD, True, timedelta(20), wait_for_workers=False
    )
    clients = [
        TCPStore("127.0.0.1", server.port, WORLD, False, timedelta(20))
        for _ in range(1, WORLD)
    ]
    yield [server, *clients]


def faults(
    stores: list[Any], nodes: dict[int, Node], wait_s: float = 20.0
) -> list[str]:
    """What each rank of `nodes` finds. It must find it only once all know it."""

    def check(rank: int) -> str:
        try:
            check_nodes_agree(stores[rank], nodes[rank], rank, WORLD, wait_s)
        except NodesDisagree as error:
            read = [f"sglang_dcp/nodes/read/{other}" for other in nodes]
            assert stores[rank].check(read), "a rank left before all had read"
            return str(error)
        return ""

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(check, nodes))


def test_nodes_with_equal_facts_agree(stores: list[Any]) -> None:
    nodes = {rank: node(rank // 2) for rank in range(WORLD)}
    assert faults(stores, nodes) == [""] * WORLD


@pytest.mark.parametrize("rank", range(WORLD))
def test_all_ranks_find_the_one_that_differs(rank: int, stores: list[Any]) -> None:
    nodes = {other: node(other // 2) for other in range(WORLD)}
    nodes[rank] = node(rank // 2, replace(CONFIG, comm_backend="a2a"))
    found = faults(stores, nodes)
    first, second = ("a2a", "ag_rs") if rank == 0 else ("ag_rs", "a2a")
    where = 0 if rank == 0 else rank // 2
    assert found == [
        f"--dcp-comm-backend is {first} on node 0 and {second} on node {where}; give all "
        "nodes the same flags and the same releases"
    ] * len(nodes)


def test_all_ranks_find_those_that_say_nothing(stores: list[Any]) -> None:
    found = faults(stores, {rank: node(0) for rank in (0, 2)}, wait_s=1.0)
    assert found[0] == found[1]
    assert found[0].startswith(
        "ranks 1, 3 named no layout: they have no DCP flags, or ended; give all nodes"
    )


def test_each_field_of_the_config_is_compared() -> None:
    named = {field.name for field in fields(DcpConfig)}
    assert named == set(
        OTHER
    ), "give the new field a value here, and hooks.nodes a fact"
    facts = _facts(node_args(), CONFIG)
    for name, value in OTHER.items():
        changed = _facts(node_args(), replace(CONFIG, **{name: value}))
        assert first_difference([(0, facts), (1, changed)]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_backend": "fa3"},
        {"dtype": "half"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"disable_chunked_prefix_cache": True},
        {"flashinfer_mla_disable_ragged": True},
        {"max_running_requests": 3},
    ],
    ids=str,
)
def test_what_a_merge_relies_on_is_compared(changes: dict[str, str]) -> None:
    """Each backend has its log base, each cache its rounding, each form its collectives."""
    [(name, value)] = changes.items()
    facts, other = _facts(node_args(), CONFIG), _facts(node_args(**changes), CONFIG)
    said = first_difference([(0, facts), (1, other)])
    assert f"--{name.replace('_', '-')} is " in said and f"{value} on node 1" in said


def test_the_size_of_a_prefix_chunk_is_compared() -> None:
    facts = _facts(node_args(), CONFIG)
    with envs.SGLANG_MAX_KV_CHUNK_CAPACITY.override(4096):
        other = _facts(node_args(), CONFIG)
    said = first_difference([(0, facts), (1, other)])
    assert said.startswith("SGLANG_MAX_KV_CHUNK_CAPACITY is ") and "4096 on" in said


def test_what_makes_steps_of_short_prefills_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    facts = _facts(node_args(), CONFIG)
    graphs = _facts(node_args(cuda_graph_config="up to 8"), CONFIG)
    said = first_difference([(0, facts), (1, graphs)])
    assert said.startswith("sizes of CUDA graphs is ") and "up to 8 on node 1" in said
    monkeypatch.setenv(SWITCH, "0")
    off = _facts(node_args(), CONFIG)
    assert first_difference([(0, facts), (1, off)]).startswith(f"{SWITCH} is 1 on")


def test_a_single_node_is_none() -> None:
    assert node_of(node_args(nnodes=1, node_rank=0), CONFIG) is None
    assert node(1).ranks == 2


@pytest.mark.parametrize(("given", "wait_s"), [(None, 300.0), (1200, 1200.0)])
def test_a_node_waits_as_long_as_the_watchdog_or_as_told(
    given: int | None, wait_s: float
) -> None:
    assert node(0, dist_timeout=given).wait_s == wait_s


WATCH = """
import sys, time
from sglang_dcp.distributed.nodes import Node, watch_meeting
node = Node(1, 2, 2, "host:1", 0.3, ())
watch_meeting(node)
if "met" in sys.argv:
    node.met.set()
time.sleep(2)
print("still here")
"""


def test_a_node_whose_peers_do_not_come_ends() -> None:
    done = run_python("-c", WATCH, timeout_s=60)
    assert done.code == 1 and "still here" not in done.stdout
    assert done.stderr.startswith(
        "sglang-dcp: error: --node-rank 1: the ranks of --nnodes 2 did not meet at host:1 "
        "within 0.3 s; give each node a --node-rank of its own from 0 to 1"
    )


def test_a_node_whose_peers_came_goes_on() -> None:
    done = run_python("-c", WATCH, "met", timeout_s=60)
    assert (done.code, done.stdout, done.stderr) == (0, "still here\n", "")


@pytest.mark.parametrize(
    ("layout", "nodes", "says"),
    [
        (Layout(4, 2), 2, "each DCP group of 2 ranks lies inside a node"),
        (
            Layout(4, 1),
            2,
            "DCP groups of 4 ranks lie across nodes, and so do exchanges",
        ),
        (
            Layout(4, 2),
            4,
            "DCP groups of 2 ranks lie across nodes, and so do exchanges",
        ),
    ],
    ids=str,
)
def test_the_log_says_where_groups_lie(layout: Layout, nodes: int, says: str) -> None:
    config = DcpConfig(layout)
    found = node_of(node_args(nnodes=nodes, node_rank=0), config)
    assert found is not None and where_groups_lie(config, found) == says


def test_launches_of_the_gpu_tests_see_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1,0")
    first = make_nodes(tmp_path, ["--tp", "4"], tmp_path, {"A": "b"}, nodes=2, gpus=4)
    pair = (first, *first.others)
    assert [node._env["CUDA_VISIBLE_DEVICES"] for node in pair] == ["7,5", "3,1"]
    assert len({node._env["NCCL_HOSTID"] for node in pair}) == 2
    commands = [" ".join(node.command) for node in pair]
    for rank, command in enumerate(commands):
        assert command.endswith(f"--node-rank {rank}")
    meets = {command.split("--dist-init-addr ")[1].split()[0] for command in commands}
    assert len(meets) == 1 and meets.pop().startswith("127.0.0.1:")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
