"""The DCP process groups on real gloo ranks, beside SGLang's own groups.

Only this file finds groups that every rank built, but not from the same ranks or in
the same order. The file is its own worker: it imports SGLang once and forks the ranks.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, List, Tuple

import pytest

from helpers.group_worlds import fork_worlds, join_world, run_worker
from helpers.parallel import init_groups, leave_groups
from sglang_dcp.distributed import groups
from sglang_dcp.distributed.topology import Layout


def check_layout(
    rank: int, world_size: int, tp_size: int, attn_tp_size: int, expected: Any
) -> None:
    import torch

    init_groups(tp_size, world_size // tp_size, backend="gloo")
    accessors = (groups.get_dcp_group, groups.get_attn_tp_group)
    layout = Layout(tp_size, attn_tp_size)
    for _ in range(2):
        for accessor in accessors:
            with pytest.raises(RuntimeError, match="does not exist"):
                accessor()
        assert groups.dcp_groups_for_capture() == []
        groups.init_dcp_groups(layout)
        with pytest.raises(RuntimeError, match="exist already"):
            groups.init_dcp_groups(layout)
        for accessor, all_ranks in zip(accessors, expected):
            group = accessor()
            mine = next(ranks for ranks in all_ranks if rank in ranks)
            gathered = group.all_gather(torch.tensor([10 * rank + 7]), dim=0)
            assert gathered.tolist() == [10 * other + 7 for other in mine]
            assert group.ranks == mine
            assert group.rank_in_group == mine.index(rank)
            assert group.pynccl_comm is None and group.ca_comm is None
            assert group.torch_symm_mem_comm is None and group.mq_broadcaster is None
        assert groups.get_dcp_group().rank_in_group == layout.dcp_rank(rank % tp_size)
        captured = groups.dcp_groups_for_capture()
        assert groups.get_dcp_group() in captured
        assert (groups.get_attn_tp_group() in captured) == (attn_tp_size > 1)
        groups.destroy_dcp_groups()
    groups.destroy_dcp_groups()
    leave_groups()


CASES = {
    4: [
        (4, 2, ([[0, 1], [2, 3]], [[0, 2], [1, 3]])),
        (4, 1, ([[0, 1, 2, 3]], [[0], [1], [2], [3]])),
        (2, 1, ([[0, 1], [2, 3]], [[0], [1], [2], [3]])),
    ],
    2: [(2, 1, ([[0, 1]], [[0], [1]]))],
}


def rank_body(rank: int, world_size: int, store: str) -> None:
    from sglang.srt.distributed import parallel_state

    join_world(rank, world_size, store)
    for tp_size, attn_tp_size, expected in CASES[world_size]:
        check_layout(rank, world_size, tp_size, attn_tp_size, expected)
    groups.init_dcp_groups(Layout(world_size, world_size))
    with pytest.raises(RuntimeError, match="--dcp-size above 1"):
        groups.get_dcp_group()
    with pytest.raises(ValueError, match="do not split into pools of --tp-size 8"):
        groups.init_dcp_groups(Layout(8, 4))
    parallel_state.destroy_distributed_environment()


def test_real_ranks_of_worlds_4_and_2(tmp_path: Path) -> None:
    run_worker(__file__, tmp_path, 4, 2)


class StubGroup:
    def __init__(self, name: str, world_size: int, log: List[Tuple[str, Any]]) -> None:
        self.name, self.world_size, self.log = name, world_size, log

    @contextmanager
    def graph_capture(self, context: Any) -> Iterator[Any]:
        self.log.append((f"enter {self.name}", context))
        try:
            yield context
        finally:
            self.log.append((f"exit {self.name}", context))


@pytest.mark.parametrize(
    ("attn_tp_size", "inside"),
    [
        pytest.param(2, ["dcp_size", "attn_tp"], id="attn2"),
        pytest.param(1, ["dcp_size"], id="attn1"),
        pytest.param(None, [], id="off"),
    ],
)
def test_graph_capture_enters_each_group_once(
    attn_tp_size: int | None, inside: List[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: List[Tuple[str, Any]] = []
    context = SimpleNamespace(stream="capture stream")

    @contextmanager
    def original(prefix: str, *, stream: Any = None) -> Iterator[Any]:
        log.append((f"enter {prefix} {stream}", None))
        try:
            yield context
        finally:
            log.append((f"exit {prefix}", None))

    if attn_tp_size is not None:
        monkeypatch.setattr(groups, "_KVP", StubGroup("dcp_size", 2, log))
        monkeypatch.setattr(groups, "_ATTN_TP", StubGroup("attn_tp", attn_tp_size, log))
    with pytest.raises(KeyError):
        with groups.graph_capture_with_dcp(original, "tp", stream=5) as seen:
            assert seen is context
            log.append(("body", None))
            raise KeyError
    assert log == [
        ("enter tp 5", None),
        *[(f"enter {name}", context) for name in inside],
        ("body", None),
        *[(f"exit {name}", context) for name in inside[::-1]],
        ("exit tp", None),
    ]


def test_weights_travel_by_the_captured_steps_communicator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    log: List[str] = []

    @contextmanager
    def change_state(enable: bool) -> Iterator[None]:
        log.append(f"enabled {enable}")
        yield
        log.append("as before")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    pynccl = SimpleNamespace(change_state=change_state)
    for comm in (pynccl, None):
        group: Any = SimpleNamespace(pynccl_comm=comm)
        with groups.use_pynccl(group):
            log.append("gather")
    wanted = ["wait", "enabled True", "gather", "as before", "wait", "gather"]
    assert log == wanted


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(fork_worlds(rank_body, *sys.argv[2:]))
    sys.exit(pytest.main([__file__]))
