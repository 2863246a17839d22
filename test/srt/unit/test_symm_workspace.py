"""The inbox protocol of `symm_a2a` in a model, who can reach whom, and what a fault says.

Only this file sees an interleaving of ranks that loses a word: on a GPU it would take luck.
"""

from __future__ import annotations

import gc
import logging
import random
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import inbox_model
from helpers.gloo_ranks import run_python
from helpers.inbox_model import ProtocolError
from sglang_dcp.distributed.exchange.symm_a2a import workspace as memory
from sglang_dcp.distributed.exchange.symm_a2a.kernel import Workspace

WORLDS = (2, 3, 4, 8)
WATCH = "symm_a2a fault watch"


def calls_of(seed: int) -> list[int]:
    """Chunks of each call of a run."""
    rng = random.Random(seed)
    return [rng.randint(1, 4) for _ in range(6)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_two_places_lose_no_word(world_size: int) -> None:
    for seed in range(160 // world_size**2 + 5):
        inbox_model.run(world_size, calls_of(seed), places=2, seed=seed)


@pytest.mark.parametrize("world_size", WORLDS)
def test_one_place_loses_words(world_size: int) -> None:
    """Else the model would say nothing of two."""
    lost = 0
    for seed in range(10):
        try:
            inbox_model.run(world_size, calls_of(seed), places=1, seed=seed)
        except ProtocolError:
            lost += 1
    assert lost >= 5


def test_a_call_that_one_rank_skips_is_noticed() -> None:
    """Ranks must issue the same calls: the model finds the one that waits in vain."""
    with pytest.raises(ProtocolError, match="deadlock"):
        inbox_model.run(2, [1, 1], places=2, seed=1, skipped=(1, 1))


def place(host: str, device: int, gpu: str = "", machine: str = "") -> memory.Place:
    return memory.Place(host, machine or host, device, gpu or f"gpu {device}")


TWO_ON_ONE = "ranks share GPU 0 of a"
OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
PAIRS = [
    ([place("a", 0), place("a", 1), place("a", 2)], (), ""),
    ([place("a", 0), place("a", 1), place("b", 0)], (), "a and b are two nodes"),
    # Ranks of two machines that were given one name, with GPUs of different numbers.
    (
        [place("a", 0), place("a", 1, machine="other")],
        (),
        "a and a are two nodes",
    ),
    (
        [place("a", 0), place("a", 1), place("a", 2)],
        ((1, 2),),
        "GPU 1 cannot access the memory of GPU 2",
    ),
    ([place("a", 0), place("a", 3)], (), "the rank on GPU 0 does not see GPU 3"),
    ([place("a", 0), place("a", 0)], (), TWO_ON_ONE),
    # `SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS`, or two launches with CUDA_VISIBLE_DEVICES.
    (
        [place("a", 0), place("a", 0, gpu="gpu 5")],
        (),
        "ranks of a call different GPUs GPU 0",
    ),
    # Two launches, one of them with --base-gpu-id 1.
    (
        [place("a", 0), place("a", 1, gpu="gpu 5")],
        (),
        "the rank on GPU 0 does not see GPU 1",
    ),
]


@pytest.mark.parametrize("allowed", ["", "0", "1"])
@pytest.mark.parametrize("places, cut, wanted", PAIRS)
def test_all_ranks_find_the_same_unreachable_peer(
    places: list[memory.Place],
    cut: Any,
    wanted: str,
    allowed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where PyTorch is `allowed` to map one GPU for two ranks, these reach each other."""
    monkeypatch.setenv(OVERLAPPING, allowed)
    if allowed == "1" and wanted == TWO_ON_ONE:
        wanted = ""

    def see(mine: memory.Place) -> None:
        """What CUDA and the system tell the rank at this place."""
        names = {number: f"gpu {number}" for number in range(3)}
        names[mine.device] = mine.gpu
        for holder, name, found in (
            (torch.cuda, "current_device", mine.device),
            (torch.cuda, "device_count", 3),
            (memory.socket, "gethostname", mine.host),
            (memory, "_machine", mine.machine),
        ):
            monkeypatch.setattr(holder, name, lambda found=found: found)
        monkeypatch.setattr(memory, "_gpu", names.__getitem__)
        monkeypatch.setattr(
            torch.cuda, "can_device_access_peer", lambda a, b: (a, b) not in cut
        )

    firsts = []
    for mine in places:
        see(mine)
        firsts.append(memory._first_unreachable(mine, places))
    found = set()
    for rank, mine in enumerate(places):
        see(mine)
        rounds = iter((places, firsts))

        def all_gather(into: list[Any], sent: Any, group: Any) -> None:
            every = next(rounds)
            assert sent == every[rank]
            into[:] = every

        monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
        group: Any = SimpleNamespace(world_size=len(places), cpu_group=None)
        found.add(memory.unreachable_peer(group))
    assert found == {wanted}


def test_a_machine_is_known_by_its_boot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert re.fullmatch("[0-9a-f-]{36}", memory._machine())
    monkeypatch.setattr(memory, "_BOOT_ID", tmp_path / "absent")
    assert memory._machine() == ""


def a_workspace(rank: int = -1, peer: int = -1) -> Workspace:
    """With the fault that a kernel of `rank` leaves."""
    counts = torch.zeros(4, dtype=torch.int32)
    fault = torch.tensor([1 + rank, 1 + peer], dtype=torch.int32)
    return Workspace([0, 0], counts, fault, 0, 1.5)


def test_a_fault_names_rank_and_peer() -> None:
    said = memory.fault_message(a_workspace(0, 3).fault, 1.5)
    assert "rank 0 of its DCP group waited 1.5 s for rank 3" in said
    assert memory.fault_message(a_workspace().fault, 1.5) == ""
    # The kernel writes the peer first: it says nothing yet.
    assert memory.fault_message(a_workspace(-1, 3).fault, 1.5) == ""


def watchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == WATCH]


def test_the_watch_says_a_fault_once_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    workspace = a_workspace()
    memory._watch_faults(workspace)
    [thread] = watchers()
    time.sleep(2 * memory._POLL_EVERY_S)
    assert not caplog.records and thread.is_alive()
    workspace.fault[1], workspace.fault[0] = 3, 1
    thread.join(10)
    assert not thread.is_alive()
    del workspace
    gc.collect()
    [record] = caplog.records
    assert record.levelno == logging.CRITICAL and "for rank 2" in record.message


def test_the_watch_ends_with_the_workspace(caplog: pytest.LogCaptureFixture) -> None:
    workspace = a_workspace()
    memory._watch_faults(workspace)
    [thread] = watchers()
    del workspace
    gc.collect()
    thread.join(10)
    assert not thread.is_alive() and not caplog.records


def test_a_process_that_ends_at_once_still_says_why() -> None:
    script = """
import torch
from sglang_dcp.distributed.exchange.symm_a2a import workspace as memory
from sglang_dcp.distributed.exchange.symm_a2a.kernel import Workspace
counts, fault = (torch.zeros(n, dtype=torch.int32) for n in (4, 2))
workspace = Workspace([0, 0], counts, fault, 0, 1.5)
memory._watch_faults(workspace)
fault.copy_(torch.tensor([1, 2]))
raise RuntimeError("CUDA error")
"""
    done = run_python("-c", script)
    assert done.code == 1 and "CUDA error" in done.stderr
    assert done.stderr.count("rank 0 of its DCP group waited 1.5 s for rank 1") == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
