"""Several nodes: how their ranks find out that they do not belong together.

Each node is a launch of its own with flags of its own. Ranks that disagree on the layout
would wait for each other for hours, or merge what does not fit. So they compare what must
be equal before the first collective of DCP, and a node waits for the others only so long.

This module imports torch only inside of functions.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Mapping, Sequence

# SGLang's groups exist by then, so all ranks are at most seconds apart.
WAIT_S = 60.0
# They found the same difference, and have only to read it.
_READ_S = 10.0
_PREFIX = "sglang_dcp/nodes"


class NodesDisagree(Exception):
    """The nodes do not belong together. The message names what differs, and where."""


@dataclass(frozen=True)
class Node:
    """One launch of several, as one of its scheduler processes sees it.

    Attributes
    ----------
    rank, count : int
        `--node-rank` and `--nnodes`.
    ranks : int
        Scheduler processes of a node.
    address : str
        Where the nodes meet.
    wait_s : float
        How long a node waits for the others.
    facts : tuple of (name, value)
        What must be equal on all nodes. A name is that of a flag, or of a package.
    met : threading.Event
        Set when all ranks have met.
    """

    rank: int
    count: int
    ranks: int
    address: str
    wait_s: float
    facts: tuple[tuple[str, str], ...]
    met: threading.Event = field(
        default_factory=threading.Event, compare=False, repr=False
    )


def watch_meeting(node: Node) -> None:
    """End this process if `node.met` is not set within `node.wait_s`.

    PyTorch would wait for ranks that never come for 10 to 120 minutes, and would not say
    which node they belong to.
    """

    def watch() -> None:
        if not node.met.wait(node.wait_s):
            print(late_message(node), file=sys.stderr, flush=True)
            # The main thread waits inside of PyTorch, where no exception reaches it.
            os._exit(1)

    threading.Thread(target=watch, name="meeting of the nodes", daemon=True).start()


def late_message(node: Node) -> str:
    """Return why a node whose peers did not come ends."""
    return (
        f"sglang-dcp: error: --node-rank {node.rank}: the ranks of --nnodes {node.count} "
        f"did not meet at {node.address} within {node.wait_s:g} s; give each node a "
        f"--node-rank of its own from 0 to {node.count - 1} and the same --nnodes, "
        "--tp-size and --dist-init-addr, and see the logs of the others; --dist-timeout "
        "makes a node wait longer"
    )


def check_nodes_agree(
    store: Any, node: Node, rank: int, world_size: int, wait_s: float = WAIT_S
) -> None:
    """Compare the facts of all ranks. It is no collective, so no rank can hang in it.

    All ranks that say their facts decide alike. No rank that found a difference returns
    before all of them have read it, because the store ends with one of them.

    Parameters
    ----------
    store : torch.distributed.Store
        Shared by all ranks.
    node : Node
    rank, world_size : int
        In the world of all nodes.
    wait_s : float
        How long to wait for a rank that says nothing.

    Raises
    ------
    NodesDisagree
        Facts differ, or a rank said none.
    """
    from torch.distributed import PrefixStore

    shared = PrefixStore(_PREFIX, store)
    shared.set(f"facts/{rank}", json.dumps([node.rank, dict(node.facts)]))
    silent = _missing(shared, "facts", range(world_size), wait_s)
    speaking = [other for other in range(world_size) if other not in silent]
    said = [json.loads(shared.get(f"facts/{other}")) for other in speaking]
    fault = silence(silent) or first_difference(said)
    if fault:
        shared.set(f"read/{rank}", "")
        _missing(shared, "read", speaking, _READ_S)
        raise NodesDisagree(fault)


def _missing(store: Any, what: str, ranks: Sequence[int], wait_s: float) -> list[int]:
    """Wait until each of `ranks` has set its key, and return those that have not."""
    keys = {rank: f"{what}/{rank}" for rank in ranks}
    try:
        store.wait(list(keys.values()), timedelta(seconds=wait_s))
    except RuntimeError:
        # What a store raises after its timeout. If the store is gone, this raises again.
        return [rank for rank, key in keys.items() if not store.check([key])]
    return []


def silence(ranks: Sequence[int]) -> str:
    """Return what it means that `ranks` said no facts, or "" if there are none."""
    if not ranks:
        return ""
    listed = ", ".join(map(str, ranks))
    return (
        f"ranks {listed} named no layout: they have no DCP flags, or ended; give all nodes "
        "the same --dcp-size, --attn-tp-size, --dcp-comm-backend and "
        "--dcp-replicate-q-proj"
    )


def first_difference(said: Sequence[tuple[int, Mapping[str, str]]]) -> str:
    """Return the first fact that is not equal on all nodes, or "".

    `said` has the node and the facts of each rank.
    """
    (first, mine), *others = said
    for node, theirs in others:
        for name in dict.fromkeys([*mine, *theirs]):
            one, other = mine.get(name, "not set"), theirs.get(name, "not set")
            if one != other:
                return (
                    f"{name} is {one} on node {first} and {other} on node {node}; give "
                    "all nodes the same flags and the same releases"
                )
    return ""
