"""All-to-all: what goes to NCCL call by call, and real gloo ranks through SGLang.

A fake NCCL library sees pointers, counts and the order of calls, which no result can
show; real ranks see rank order and the group that a tensor is sent over.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Tuple

import pytest
import torch

from helpers.group_worlds import fork_worlds, join_world, run_worker
from helpers.random_bytes import random_bytes
from sglang_dcp.distributed import all_to_all, all_to_all_peers
from sglang_dcp.distributed.all_to_all import (
    group_all_to_all_single,
    pynccl_all_to_all_single,
)
from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers, nccl_group

STREAM = 0x5EED
DTYPES = [
    pytest.param(torch.bfloat16, 9, False, id="bf16"),
    pytest.param(torch.float32, 7, False, id="fp32"),
    pytest.param(torch.uint8, 1, False, id="uint8"),
    pytest.param(torch.float8_e4m3fn, 1, True, id="fp8"),
    pytest.param(torch.bool, 1, True, id="bool"),
    pytest.param(torch.int16, 1, True, id="int16"),
]


class FakeNccl:
    """Records the calls of one rank; a peer in ``broken`` fails the send to it."""

    def __init__(self, broken: Tuple[int, ...] = ()) -> None:
        self.calls: List[Tuple[Any, ...]] = []
        self.broken = broken

    def ncclGroupStart(self) -> None:
        self.calls.append(("start",))

    def ncclGroupEnd(self) -> None:
        self.calls.append(("end",))

    def ncclSend(self, *call: Any) -> None:
        if call[3] in self.broken:
            raise RuntimeError("NCCL error: unhandled system error")
        self._record("send", *call)

    def ncclRecv(self, *call: Any) -> None:
        self._record("recv", *call)

    def _record(self, name: str, *call: Any) -> None:
        buffer, count, dtype, peer, comm, stream = call
        assert comm == "comm" and stream.value == STREAM
        self.calls.append((name, buffer.value, count, dtype, peer))


def make_comm(rank: int, world_size: int, broken: Tuple[int, ...] = ()) -> Any:
    return SimpleNamespace(
        disabled=False,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        nccl=FakeNccl(broken),
        comm="comm",
        _resolve_stream=lambda: SimpleNamespace(cuda_stream=STREAM),
    )


def as_bytes(tensor: torch.Tensor) -> List[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "place", [(1, 3), (0, 2), (7, 8)], ids=["1of3", "0of2", "7of8"]
)
@pytest.mark.parametrize(("dtype", "code", "in_bytes"), DTYPES)
def test_calls_of_one_rank(
    dtype: torch.dtype, code: int, in_bytes: bool, place: Tuple[int, int]
) -> None:
    rank, world_size = place
    comm = make_comm(rank, world_size)
    source = random_bytes((world_size * 2, 5), dtype, seed=1)
    output = random_bytes((world_size * 2, 5), dtype, seed=2)
    wanted = as_bytes(output)
    pynccl_all_to_all_single(comm, output, source)

    step = 2 * 5 * source.element_size()
    count = step if in_bytes else 10
    expected: List[Tuple[Any, ...]] = [("start",)]
    for peer in (other for other in range(world_size) if other != rank):
        expected.append(("send", source.data_ptr() + peer * step, count, code, peer))
        expected.append(("recv", output.data_ptr() + peer * step, count, code, peer))
    assert comm.nccl.calls == [*expected, ("end",)]
    own = slice(rank * step, rank * step + step)
    wanted[own] = as_bytes(source)[own]
    assert as_bytes(output) == wanted


def make_group(rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A group in graph capture, whose CPU tensors pass for those of its device."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    comm = make_comm(rank, world_size)
    return SimpleNamespace(rank_in_group=rank, world_size=world_size, pynccl_comm=comm)


@pytest.mark.parametrize(
    "place", [(1, 3), (0, 2), (1, 2), (7, 8)], ids=["1of3", "0of2", "1of2", "7of8"]
)
@pytest.mark.parametrize(("dtype", "code", "in_bytes"), DTYPES)
def test_calls_of_an_exchange_with_peers(
    dtype: torch.dtype,
    code: int,
    in_bytes: bool,
    place: Tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank, world_size = place
    group = make_group(rank, world_size, monkeypatch)
    shape = ((world_size - 1) * 2, 5)
    source, output = (random_bytes(shape, dtype, seed) for seed in (1, 2))
    before = as_bytes(output)
    exchange_with_peers(group, output, source)

    step = 2 * 5 * source.element_size()
    count = step if in_bytes else 10
    expected: List[Tuple[Any, ...]] = [("start",)]
    others = (other for other in range(world_size) if other != rank)
    for chunk, peer in enumerate(others):
        expected.append(("send", source.data_ptr() + chunk * step, count, code, peer))
        expected.append(("recv", output.data_ptr() + chunk * step, count, code, peer))
    assert group.pynccl_comm.nccl.calls == [*expected, ("end",)]
    assert as_bytes(output) == before, "nothing is copied here"


def test_calls_inside_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    group = make_group(0, 2, monkeypatch)
    calls = group.pynccl_comm.nccl.calls
    with nccl_group(group):
        exchange_with_peers(group, torch.empty(1), torch.empty(1))
    inner = ["start", "send", "recv", "end"]
    assert [call[0] for call in calls] == ["start", *inner, "end"]
    with pytest.raises(ValueError, match="of the second"), nccl_group(group):
        raise ValueError("of the second")
    assert [call[0] for call in calls[-2:]] == ["start", "end"]
    group.pynccl_comm.disabled = True
    with nccl_group(group):
        pass
    group.pynccl_comm = None
    with nccl_group(group):
        pass
    assert len(calls) == len(inner) + 4


@pytest.mark.parametrize("shape", [(0, 4), (6, 0)], ids=["no-rows", "no-columns"])
def test_empty_tensors_make_no_call(shape: Tuple[int, int]) -> None:
    comm = make_comm(rank=0, world_size=3)
    pynccl_all_to_all_single(comm, torch.empty(shape), torch.empty(shape))
    group: Any = SimpleNamespace(rank_in_group=0, world_size=3, pynccl_comm=comm)
    exchange_with_peers(group, torch.empty(shape), torch.empty(shape))
    assert comm.nccl.calls == []


def test_failing_send_still_closes_the_group() -> None:
    comm = make_comm(rank=0, world_size=3, broken=(2,))
    with pytest.raises(RuntimeError, match="unhandled system error"):
        pynccl_all_to_all_single(comm, torch.empty(6), torch.arange(6.0))
    assert [call[0] for call in comm.nccl.calls] == ["start", "send", "recv", "end"]


def test_disabled_communicator_does_nothing() -> None:
    comm, output = make_comm(rank=0, world_size=2), torch.ones(4)
    comm.disabled = True
    pynccl_all_to_all_single(comm, output, torch.zeros(4))
    assert comm.nccl.calls == [] and output.tolist() == [1.0] * 4


def test_given_stream_is_used() -> None:
    comm, output = make_comm(rank=0, world_size=2), torch.zeros(2)
    comm._resolve_stream = lambda: pytest.fail("the stream was given")
    stream: Any = SimpleNamespace(cuda_stream=STREAM)
    pynccl_all_to_all_single(comm, output, torch.ones(2), stream=stream)
    assert [call[0] for call in comm.nccl.calls] == ["start", "send", "recv", "end"]
    assert output.tolist() == [1.0, 0.0]


BUFFER = torch.zeros(12)
BAD_PAIRS = [
    pytest.param(torch.ones(4, 6).t(), torch.ones(6, 4), "contiguous output", id="out"),
    pytest.param(torch.ones(6, 4), torch.ones(4, 6).t(), "contiguous input", id="in"),
    pytest.param(torch.ones(6), torch.ones(9), "has shape torch.Size", id="shape"),
    pytest.param(torch.ones(6), torch.ones(6).bool(), "torch.bool", id="dtype"),
    pytest.param(BUFFER.to("meta"), torch.ones(12), "device meta", id="device"),
    pytest.param(torch.ones(4), torch.ones(4), "3 equal chunks", id="odd-split"),
    pytest.param(torch.ones(()), torch.ones(()), "3 equal chunks", id="scalar"),
    pytest.param(BUFFER[:6], BUFFER[3:9], "cannot work in place", id="overlap"),
]


@pytest.mark.parametrize(("output", "source", "message"), BAD_PAIRS)
def test_bad_tensors_are_refused(
    output: torch.Tensor,
    source: torch.Tensor,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comm = make_comm(rank=0, world_size=3)
    with pytest.raises(ValueError, match=message):
        pynccl_all_to_all_single(comm, output, source)
    with pytest.raises(ValueError, match=message):
        group: Any = SimpleNamespace(world_size=3, pynccl_comm=None)
        group_all_to_all_single(group, output, source)
    with pytest.raises(ValueError, match=message):
        group = SimpleNamespace(world_size=4, rank_in_group=0, pynccl_comm=comm)
        exchange_with_peers(group, output, source)
    comm.device = torch.device("cuda:1")
    with pytest.raises(ValueError, match="works on cuda:1, the tensors are on cpu"):
        pynccl_all_to_all_single(comm, torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="works on cuda:1, the tensors are on cpu"):
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
        exchange_with_peers(group, torch.ones(3), torch.zeros(3))
    assert comm.nccl.calls == []


def test_group_of_one_copies() -> None:
    group: Any = SimpleNamespace(world_size=1, pynccl_comm=None)
    group_all_to_all_single(group, output := torch.zeros(3), torch.arange(3.0))
    assert output.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("disabled", "is_cpu", "taken"),
    [
        pytest.param(False, False, "pynccl", id="captured"),
        pytest.param(True, False, "device group", id="eager"),
        pytest.param(False, True, "cpu group", id="cpu-tensor"),
    ],
)
def test_group_chooses_its_back_end(
    disabled: bool, is_cpu: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: Any, group: str = "pynccl") -> None:
        seen.append(group)

    seen: List[str] = []
    monkeypatch.setattr(all_to_all, "pynccl_all_to_all_single", record)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", record)
    group: Any = SimpleNamespace(world_size=2)
    group.pynccl_comm = SimpleNamespace(disabled=disabled)
    group.device_group, group.cpu_group = "device group", "cpu group"
    monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
    group_all_to_all_single(group, torch.zeros(2), torch.ones(2))
    group.rank_in_group, group.pynccl_comm.device = 0, torch.device("cpu")
    monkeypatch.setattr(all_to_all_peers, "send_and_receive", record)
    group.pynccl_comm._resolve_stream = lambda: None
    exchange_with_peers(group, torch.zeros(2), torch.ones(2))
    assert seen == [taken, taken]


def test_real_ranks_of_worlds_2_and_3(tmp_path: Path) -> None:
    run_worker(__file__, tmp_path, 2, 3)


def rank_body(rank: int, world_size: int, store: str) -> None:
    from sglang.srt.distributed import parallel_state

    join_world(rank, world_size, store)
    group = parallel_state.get_world_group()
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        group.all_to_all_single(torch.empty(6), torch.zeros(6))

    def on_cpu(output: torch.Tensor, source: torch.Tensor, name: str) -> None:
        parallel_state._groups[name]()._all_to_all_single(output, source)

    library = torch.library.Library("sglang", "IMPL")
    library.impl("reg_all_to_all_single", on_cpu, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group.__class__, "_all_to_all_single", group_all_to_all_single)
        for dtype, *_ in (case.values for case in DTYPES):
            for shape in ((world_size * 3, 2, 5), (world_size, 1), (0, 4)):
                check_exchange(group, shape, dtype)
    parallel_state.destroy_distributed_environment()


def check_exchange(group: Any, shape: Tuple[int, ...], dtype: Any) -> None:
    rank, world_size = group.rank_in_group, group.world_size
    output = random_bytes(shape, dtype, seed=99)
    sources = [random_bytes(shape, dtype, seed=seed) for seed in range(world_size)]
    group.all_to_all_single(output, sources[rank])
    chunks = [source.chunk(world_size)[rank] for source in sources if shape[0]]
    assert as_bytes(output) == (as_bytes(torch.cat(chunks)) if chunks else [])

    # The same without the own chunk, on both sides.
    def without(tensor: torch.Tensor, own: int) -> torch.Tensor:
        kept = [c for i, c in enumerate(tensor.chunk(world_size)) if i != own]
        return torch.cat(kept) if shape[0] else tensor

    output = without(random_bytes(shape, dtype, seed=99), rank)
    exchange_with_peers(group, output, without(sources[rank], rank))
    if shape[0]:
        wanted = [c for i, c in enumerate(chunks) if i != rank]
        assert as_bytes(output) == as_bytes(torch.cat(wanted))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(fork_worlds(rank_body, *sys.argv[2:]))
    sys.exit(pytest.main([__file__]))
