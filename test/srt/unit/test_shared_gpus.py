"""What servers and ranks get that share a GPU, and which of them do.

Only this file sees it without a GPU. On one, a server whose ranks do not find each other, or
whose kernels wait for each other for ever, would only time out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from helpers import gpu_checkpoints, shared_gpus, teacher_forcing
from helpers.doors import with_door
from helpers.gpu_cases import marks_of
from helpers.gpu_nodes import make_nodes
from helpers.gpu_servers import Spec, make_server
from helpers.nccl_ranks import needs_gpus
from helpers.needs_sglang import needs_sglang
from sglang_dcp.demo.server import ServerProcess

PER_GPU = "SGLANG_DCP_TEST_RANKS_PER_GPU"
OVERLAPPING = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
PART = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
NO_OWN_ALL_REDUCE = "--disable-custom-all-reduce"

Machine = Callable[[int, int], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Call it with the number of GPUs, and of the ranks that may share one."""

    def has(gpus: int, ranks: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv(PER_GPU, str(ranks))
        names = ",".join(str(number) for number in range(gpus))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)

    return has


@pytest.mark.parametrize(
    "gpus, ranks, places", [(0, 4, 0), (1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 2, 4)]
)
def test_tests_run_where_their_ranks_have_room(
    gpus: int, ranks: int, places: int, machine: Machine
) -> None:
    machine(gpus, ranks)
    assert shared_gpus.places() == places
    for count in (1, 2, 4, 8):
        assert needs_gpus(count).args == (count > places,)
        assert Spec("", "", f"--tp {count}").can_run() == (count <= places)


def test_without_the_variable_no_gpu_is_shared(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 2)
    monkeypatch.delenv(PER_GPU)
    assert shared_gpus.places() == 1
    assert needs_gpus(2).args == (True,)


def test_a_gpu_is_shared_where_ranks_outnumber_gpus(machine: Machine) -> None:
    for gpus, ranks, shared in ((1, 2, True), (2, 4, True), (2, 2, False)):
        machine(gpus, 2)
        assert shared_gpus.are_shared_by(ranks) == shared
        assert Spec("", "", f"--tp {ranks}").shares == shared
    # Ranks of the unit tests run on CPUs.
    machine(0, 2)
    assert not shared_gpus.are_shared_by(2)


@pytest.mark.parametrize(
    "gpus, ranks, part", [(1, 2, "50"), (1, 4, "25"), (2, 4, "50"), (2, 3, "50")]
)
def test_the_ranks_on_a_gpu_have_equal_parts_of_it(
    gpus: int, ranks: int, part: str, machine: Machine
) -> None:
    machine(gpus, 4)
    own = shared_gpus.environment(ranks)
    assert own[PART] == part and own[OVERLAPPING] == "1"
    assert own["NCCL_SOCKET_IFNAME"] == "lo"
    # Two nodes cannot map each other's memory, and are to find that out.
    of_nodes = shared_gpus.environment(ranks, nodes=2)
    assert of_nodes == {key: own[key] for key in own if key != OVERLAPPING}


class Ranks(msgspec.Struct, frozen=True):
    """SGLang's `SpawnRanks`, which only its later releases have."""

    world_rank: int
    gpu_id: int | None


def sharing(plugin: str) -> str:
    return with_door(plugin, "shared_gpus")


def loaded(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "plugin", "exec"), names)
    return names


def test_the_plugin_loads_what_it_had_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    order: list[Any] = []
    monkeypatch.setattr(HookRegistry, "register", lambda *hook: order.append(hook))
    names = loaded(sharing("def load():\n    order.append('own')\n"))
    names["order"] = order
    names["load"]()
    target = "sglang.srt.runtime_context.publish"
    assert order == ["own", (target, shared_gpus.place_process, HookType.AROUND)]


def test_every_plugin_of_gpu_servers_can_share() -> None:
    for source in (teacher_forcing.PLUGIN, teacher_forcing.NO_PLUGIN):
        both = sharing(source)
        compile(both, "plugin", "exec")
        assert both.count("def load():") == 1
    with pytest.raises(AssertionError):
        sharing("def loads(): ...")


@needs_sglang("0.5.23", "older releases publish no place of a process")
@pytest.mark.parametrize("launch", ["", "node-1"])
def test_each_rank_is_a_host_for_nccl_and_has_a_gpu_that_is_there(
    launch: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.platforms import current_platform

    machine(2, 2)
    gpus = [SimpleNamespace(uuid=name) for name in ("A", "B")]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(current_platform, "get_device_uuid", None, raising=False)
    place = shared_gpus.place_process

    def published(role: str, *, ranks: Ranks | None) -> tuple[str, Ranks | None]:
        return role, ranks

    hosts, uuids = set(), []
    for rank, gpu in enumerate((0, 1, 0, 1)):
        monkeypatch.setenv("NCCL_HOSTID", launch)
        found = place(published, "scheduler", ranks=Ranks(rank, rank))
        assert found == ("scheduler", Ranks(rank, gpu))
        hosts.add(os.environ["NCCL_HOSTID"])
        uuids.append(current_platform.get_device_uuid(gpu))
    assert uuids == ["A", "B", "A-rank-2", "B-rank-3"]
    assert len(hosts) == 4 and all(host.startswith(launch) for host in hosts)
    # A process without a GPU, such as the tokenizer's.
    for ranks in (None, Ranks(0, None)):
        monkeypatch.setenv("NCCL_HOSTID", launch)
        assert place(published, "tokenizer", ranks=ranks) == ("tokenizer", ranks)
        assert os.environ["NCCL_HOSTID"] == launch


@needs_sglang("0.5.23", "older releases publish no place of a process")
def test_sglang_publishes_the_place_that_the_plugin_changes() -> None:
    from sglang.srt import runtime_context

    annotations = runtime_context.publish.__annotations__
    assert "SpawnRanks" in str(annotations["ranks"])
    ranks = runtime_context.SpawnRanks(3, gpu_id=3)
    assert msgspec.structs.replace(ranks, gpu_id=1).gpu_id == 1


DRAFTS = "--speculative-algorithm EAGLE3"


@pytest.mark.parametrize(
    "kind, ranks, flags, nodes, own",
    [
        ("mla-v3-d512", 2, "--attention-backend flashinfer", 1, True),
        ("mla-v3-d512", 2, "--attention-backend fa3", 1, False),
        ("llama-2kv-d128", 2, "--attention-backend flashinfer", 1, False),
        ("llama-2kv-d128", 2, "--dcp-comm-backend symm_a2a", 2, True),
        ("llama-2kv-d128", 2, "--dcp-comm-backend symm_a2a", 1, False),
        ("llama-2kv-d128", 2, "--dcp-comm-backend a2a", 2, False),
        ("llama-2kv-d128", 4, f"{DRAFTS} --dcp-comm-backend symm_a2a", 1, True),
        ("llama-2kv-d128", 4, "--dcp-comm-backend symm_a2a", 1, False),
        ("llama-2kv-d128", 2, f"{DRAFTS} --dcp-comm-backend symm_a2a", 1, False),
        ("llama-2kv-d128", 4, f"{DRAFTS} --dcp-comm-backend a2a", 1, False),
    ],
)
def test_some_servers_need_gpus_of_their_own(
    kind: str, ranks: int, flags: str, nodes: int, own: bool, machine: Machine
) -> None:
    spec = Spec("", kind, f"--tp {ranks} {flags}", nodes=nodes)
    for gpus in (1, ranks):
        machine(gpus, ranks)
        skips = [mark.args[0] for mark in marks_of(spec)]
        assert any(skips) == (not spec.can_run()) == (own and gpus == 1)


def server_of(spec: Spec, folder: Path, patch: pytest.MonkeyPatch) -> ServerProcess:
    """Its server, not started, without a checkpoint."""
    patch.setattr(gpu_checkpoints, "checkpoint", lambda folder, *words: folder)
    server = make_server(spec, folder)
    # Removes the folder of an MPS, which did not start either.
    server.stop()
    return server


SPEC = Spec("two", "llama-2kv-d128", "--tp 2 --dcp-size 2")


def test_ranks_that_share_a_gpu_have_an_mps_of_their_server(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 2)
    server = server_of(SPEC, tmp_path, monkeypatch)
    assert isinstance(server, shared_gpus.SharingServer)
    assert NO_OWN_ALL_REDUCE in server.command
    assert server._env[PART] == "50" and server._env[OVERLAPPING] == "1"
    pipe = Path(server._env["CUDA_MPS_PIPE_DIRECTORY"])
    assert len(f"{pipe}/control_privileged") < 108 and not pipe.exists()
    plugin = tmp_path / "two" / "forced_tokens.py"
    assert plugin.read_text() == sharing(SPEC.plugin)


def test_ranks_with_gpus_of_their_own_have_none(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2, 2)
    server = server_of(SPEC, tmp_path, monkeypatch)
    assert type(server) is ServerProcess
    assert NO_OWN_ALL_REDUCE not in server.command
    own = {PART, OVERLAPPING, "CUDA_MPS_PIPE_DIRECTORY"}
    assert not own & (set(server._env) - set(os.environ))
    assert (tmp_path / "two" / "forced_tokens.py").read_text() == SPEC.plugin


@pytest.mark.parametrize(
    "gpus, per_gpu, ranks, seen, pipes",
    [
        (1, 4, 4, ["0", "0"], 1),
        (1, 2, 2, ["0", "0"], 1),
        (2, 2, 4, ["0,1", "0,1"], 1),
        (2, 2, 2, ["0", "1"], 0),
        (4, 1, 4, ["0,1", "2,3"], 0),
    ],
)
def test_nodes_share_gpus_where_there_are_too_few(
    gpus: int,
    per_gpu: int,
    ranks: int,
    seen: list[str],
    pipes: int,
    machine: Machine,
    tmp_path: Path,
) -> None:
    machine(gpus, per_gpu)
    first = make_nodes(tmp_path, [], tmp_path, {}, nodes=2, gpus=ranks)
    first.stop()
    pair = (first, *first.others)
    assert [node._env["CUDA_VISIBLE_DEVICES"] for node in pair] == seen
    # One MPS of both nodes, since their ranks meet on each GPU.
    found = {node._env.get("CUDA_MPS_PIPE_DIRECTORY") for node in pair} - {None}
    assert len(found) == pipes
    assert len({node._env["NCCL_HOSTID"] for node in pair}) == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
