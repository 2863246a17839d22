"""A rendezvous of `symm_a2a` that fails on real gloo ranks, with stand-ins for PyTorch's.

Only this file sees ranks that disagree on whether there are inboxes, or that wait for a
peer which gave up. The waits are those of a real store. The file is its own worker: it
imports SGLang once and forks the ranks.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Callable
from unittest.mock import patch

import pytest

from helpers.gloo_ranks import (
    Outcomes,
    Worlds,
    enter_layout,
    fault_of,
    fork_worlds,
    leave_layout,
)

WORLD_SIZES = (2, 3)
# Stands in for a limit of a minute.
WAIT_S = 2.0


class Faults:
    """Where each rank fails: before a rendezvous, in it, or after it."""

    def __init__(self, name: str, rank: int, group: Any) -> None:
        self._name, self._rank, self._group = name, rank, group
        self._ranks = CASES[name]
        self.entered = 0

    def _fail(self, where: str) -> None:
        if self._rank in self._ranks.get(where, ()):
            raise RuntimeError(f"no luck {where} on {self._rank}\nC++ stack: 0x1")

    def allocate(self, world_size: int, chunks: int) -> Any:
        time.sleep(self._ranks.get("late", 0.0) * self._rank)
        self._fail("allocating")
        return SimpleNamespace(inbox="inbox", uses=None, fault=None)

    def rendezvous(self, inbox: Any, device_group: Any) -> Any:
        """PyTorch's, as far as ranks see it: each sets a key and waits for all keys."""
        from torch.distributed.distributed_c10d import _get_process_group_store

        self.entered += 1
        time.sleep(self._ranks.get("late", 0.0) * self._rank)
        self._fail("before")
        store = _get_process_group_store(device_group)
        store.set(f"{self._name}/{self._rank}", "here")
        size = self._group.world_size
        store.wait([f"{self._name}/{peer}" for peer in range(size)])
        self._fail("after")
        missing = self._ranks.get("unmapped", ())
        return SimpleNamespace(buffer_ptrs=[int(p not in missing) for p in range(size)])


Case = dict[str, Any]
# Which ranks fail where.
FAILING: dict[str, Case] = {
    "one-allocates-nothing": {"allocating": {0}},
    "all-allocate-nothing": {"allocating": {0, 1, 2}},
    "one-before": {"before": {1}},
    "one-before-late": {"before": {1}, "late": 0.5},
    "all-before": {"before": {0, 1, 2}},
    "one-after": {"after": {0}},
    "last-after-late": {"after": {1}, "late": 0.5},
    "one-here-one-there": {"before": {0}, "after": {1}},
    "no-address": {"unmapped": {1}},
}
GOING_WELL: dict[str, Case] = {"well": {}, "well-late": {"late": 0.5}}
CASES = FAILING | GOING_WELL


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def make_exchange(faults: Faults, group: Any) -> tuple[Any, list[str]]:
    """Return the exchange, and what making it logged."""
    import torch
    from torch.distributed import _symmetric_memory as symmetric

    from sglang_dcp.distributed.exchange import create_exchange
    from sglang_dcp.distributed.exchange.symm_a2a import rendezvous, workspace

    heard = Lines()
    logger = logging.getLogger("sglang_dcp")
    logger.addHandler(heard)
    inbox = torch.zeros(8, dtype=torch.uint8)

    def allocate(world_size: int, chunks: int) -> Any:
        memory = faults.allocate(world_size, chunks)
        memory.inbox = inbox
        return memory

    try:
        with (
            patch.object(rendezvous, "WAIT_S", WAIT_S),
            patch.object(workspace, "unreachable_peer", lambda _: ""),
            patch.object(workspace, "_allocate", allocate),
            patch.object(workspace, "_watch_faults", lambda _: None),
            patch.object(symmetric, "rendezvous", faults.rendezvous),
            patch.object(torch.cuda, "synchronize", lambda: None),
        ):
            return create_exchange("symm_a2a", group), heard.lines
    finally:
        logger.removeHandler(heard)


def check(rank: int, group: Any, name: str, store_timeout: Callable[[], Any]) -> None:
    import torch

    before = store_timeout()
    faults = Faults(name, rank, group)
    start = time.monotonic()
    exchange, lines = make_exchange(faults, group)
    seconds = time.monotonic() - start
    assert store_timeout() == before
    assert seconds < 10, "a rank waited longer than the limit"
    seen: list[Any] = [None] * group.world_size
    mine = (exchange.in_use, exchange.fallbacks.counts, faults.entered)
    torch.distributed.all_gather_object(seen, mine, group=group.cpu_group)
    assert all(other == mine for other in seen), seen
    if name in GOING_WELL:
        assert exchange.in_use == "symm_a2a" and not exchange.fallbacks.counts
        assert lines == []
        return
    assert exchange.in_use == "a2a"
    assert exchange.fallbacks.counts == {"rendezvous": 1}
    assert faults.entered == ("allocating" not in CASES[name])
    check_line(rank, name, lines)
    check_reduce(rank, group, exchange)


def check_line(rank: int, name: str, lines: list[str]) -> None:
    """One rank says it, in one line that names each rank that raised and why."""
    if rank:
        assert lines == []
        return
    [line] = lines
    assert "a2a takes over for all batches" in line
    assert "\n" not in line and "C++" not in line
    case = CASES[name]
    for where in ("allocating", "before"):
        for failed in case.get(where, ()):
            if failed == 0 or f"rank {failed}:" in line:
                assert f"rank {failed}: RuntimeError: no luck {where}" in line
    if name.startswith("one-before"):
        assert "rank 1: RuntimeError: no luck before on 1" in line
        # The peers gave up on rank 1.
        assert "rank 0: " in line and "no luck" in line.split("rank 1: ")[1]


def check_reduce(rank: int, group: Any, exchange: Any) -> None:
    """The fallback exchanges: each rank holds the same keys' worth of its own value."""
    import torch

    n = group.world_size
    partial = torch.full((4, n, 8), float(rank))
    out, lse = exchange.reduce(partial, torch.zeros(4, n), is_lse_base_on_e=True)
    assert torch.allclose(out, torch.full((4, 1, 8), (n - 1) / 2))
    assert torch.allclose(lse, torch.full((4, 1), float(n)).log())


def body(rank: int, world_size: int) -> Outcomes:
    from torch.distributed.distributed_c10d import _get_process_group_store

    from sglang_dcp.config import DcpConfig
    from sglang_dcp.distributed.topology import Layout

    group = enter_layout(DcpConfig(Layout(world_size, 1)), rank)

    def store_timeout() -> Any:
        store: Any = _get_process_group_store(group.device_group)
        return store.timeout

    for name in CASES:
        yield name, fault_of(check, rank, group, name, store_timeout)
    leave_layout()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    yield Worlds(__file__, tmp_path_factory.mktemp("rendezvous"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_ranks_decide_alike(worlds: Worlds, world_size: int, name: str) -> None:
    worlds.assert_passed(world_size, name)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        sys.exit(fork_worlds(body, sys.argv[-1], WORLD_SIZES))
    sys.exit(pytest.main([__file__]))
