"""Real gloo ranks of two "nodes" that were given different layouts.

Only this file sees ranks that make groups of different shapes, and so wait for each other.
The file is its own worker: it imports SGLang once and forks the ranks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.gloo_ranks import Outcomes, Worlds, fault_of, fork_worlds, leave_layout
from helpers.nodes import node_args
from helpers.parallel import init_groups

WORLD = 4
NODE = WORLD // 2
# Layouts of node 0 and of node 1, and what each rank must say.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "equal": ({}, {}, ""),
    "groups": (
        {"attn_tp_size": 2},
        {"attn_tp_size": 1},
        "--attn-tp-size is 2 on node 0 and 1 on node 1",
    ),
    "exchanges": (
        {"comm_backend": "a2a"},
        {"comm_backend": "ag_rs"},
        "--dcp-comm-backend is a2a on node 0 and ag_rs on node 1",
    ),
    "log-bases": (
        {"attention_backend": "fa3"},
        {"attention_backend": "flashinfer"},
        "--attention-backend is fa3 on node 0 and flashinfer on node 1",
    ),
}


def check(rank: int, name: str) -> None:
    from sglang_dcp.config import DcpConfig
    from sglang_dcp.context import DcpContext, set_context
    from sglang_dcp.distributed.groups import get_dcp_group
    from sglang_dcp.distributed.topology import Layout
    from sglang_dcp.hooks.nodes import node_of

    node_0, node_1, wanted = CASES[name]
    changes = dict((node_0, node_1)[rank // NODE])
    layout = Layout(WORLD, changes.pop("attn_tp_size", 2))
    config = DcpConfig(layout, changes.pop("comm_backend", "ag_rs"))
    node = node_of(node_args(node_rank=rank // NODE, **changes), config)
    assert node is not None
    set_context(DcpContext(config, rank, node))
    start = time.monotonic()
    said = ""
    try:
        init_groups(WORLD, backend="gloo")
    except SystemExit as ended:
        said = str(ended.code)
    assert node.met.is_set()
    assert time.monotonic() - start < 30, "a rank waited for others"
    if wanted:
        assert said.startswith(f"sglang-dcp: error: {wanted}; give all nodes"), said
        with pytest.raises(RuntimeError, match="does not exist"):
            get_dcp_group()
    else:
        assert said == "" and get_dcp_group().world_size == 2


def body(rank: int, world_size: int) -> Outcomes:
    from torch.distributed import distributed_c10d

    from sglang_dcp.distributed import nodes

    store = distributed_c10d._get_default_store()
    for name in CASES:
        # Facts are said once in a world. So each case has keys of its own.
        nodes._PREFIX = f"sglang_dcp/nodes/{name}"
        assert store is distributed_c10d._get_default_store()
        yield name, fault_of(check, rank, name)
        leave_layout()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    yield Worlds(__file__, tmp_path_factory.mktemp("nodes"))


@pytest.mark.parametrize("name", CASES)
def test_nodes_are_compared_before_groups_are_made(worlds: Worlds, name: str) -> None:
    worlds.assert_passed(WORLD, name)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.exit(fork_worlds(body, sys.argv[-1], (WORLD,)))
    sys.exit(pytest.main([__file__]))
