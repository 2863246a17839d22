"""Memory of ``symm_a2a``: one inbox for each rank, mapped by all ranks of the DCP group.

PyTorch's symmetric memory allocates and maps the inboxes. NVLink multicast is not used.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import PeerGroup
from sglang_dcp.distributed.exchange.symm_a2a.kernel import Workspace, inbox_bytes
from sglang_dcp.distributed.exchange.symm_a2a.rendezvous import (
    bounded_wait,
    on_all_ranks,
)

logger = logging.getLogger(__name__)

_EMPTY = 0xFF
_POLL_EVERY_S = 0.2
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Place(NamedTuple):
    """Where a rank runs.

    `machine` tells hosts of one name apart, and `gpu` GPUs of one number: two launches on
    one host may each call another GPU 0, by CUDA_VISIBLE_DEVICES.
    """

    host: str
    machine: str
    device: int
    gpu: str


def unreachable_peer(group: PeerGroup) -> str:
    """Return why a rank of the group cannot store to another one, or "".

    It is a collective over ``group.cpu_group``. The answer is the same on all ranks.
    """
    device = torch.cuda.current_device()
    mine = Place(socket.gethostname(), _machine(), device, _gpu(device))
    everyone: list[Place] = [mine] * group.world_size
    torch.distributed.all_gather_object(everyone, mine, group=group.cpu_group)
    faults = [""] * group.world_size
    torch.distributed.all_gather_object(
        faults, _first_unreachable(mine, everyone), group=group.cpu_group
    )
    return next(filter(None, faults), "")


def _machine() -> str:
    """Return what Linux drew when this machine booted, or "" where it does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _may_share_gpus() -> bool:
    """Whether PyTorch maps the memory of two ranks on one GPU.

    Live tests let it. A kernel that waits for a peer may keep the peer from running there.
    """
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"


def _gpu(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _first_unreachable(mine: Place, everyone: list[Place]) -> str:
    for other in everyone:
        if other[:2] != mine[:2]:
            return f"{mine.host} and {other.host} are two nodes"
    host, _, device, gpu = mine
    if everyone.count(mine) > 1 and not _may_share_gpus():
        return f"ranks share GPU {device} of {host}"
    visible = torch.cuda.device_count()
    for _, _, number, uuid in everyone:
        if number == device:
            # PyTorch takes the two for one GPU and raises.
            if uuid != gpu:
                return f"ranks of {host} call different GPUs GPU {device}"
            continue
        if number >= visible or _gpu(number) != uuid:
            return f"the rank on GPU {device} does not see GPU {number}"
        if not torch.cuda.can_device_access_peer(device, number):
            return f"GPU {device} cannot access the memory of GPU {number}"
    return ""


def make_workspace(group: PeerGroup, chunks: int, timeout_s: float) -> Workspace:
    """Allocate, map and empty the inboxes.

    It is a collective, and must run before any capture. No rank enters the rendezvous
    before all have allocated, and no rank may store before every inbox is empty.

    Parameters
    ----------
    group : ranks that can all reach each other
    chunks : capacity of an inbox, the same on all ranks
    timeout_s : seconds that a kernel waits for a peer

    Raises
    ------
    StepFailed
        On all ranks, if a rank could not allocate or map.
    """
    # The rendezvous takes no inference tensors.
    with torch.inference_mode(False):
        memory = on_all_ranks(group, lambda: _allocate(group.world_size, chunks))
        handle = on_all_ranks(group, lambda: _map(memory.inbox, group))
    workspace = Workspace(
        list(handle.buffer_ptrs),
        memory.uses,
        memory.fault,
        group.rank_in_group,
        timeout_s,
        owned=(handle, memory.inbox),
    )
    _watch_faults(workspace)
    return workspace


class _Memory(NamedTuple):
    inbox: Tensor  # [bytes] uint8, symmetric
    uses: Tensor  # [chunks] int32
    fault: Tensor  # [2] int32, pinned


def _allocate(world_size: int, chunks: int) -> _Memory:
    from torch.distributed import _symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    return _Memory(
        symmetric.empty(
            inbox_bytes(world_size, chunks), dtype=torch.uint8, device=device
        ),
        torch.zeros(chunks, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, pin_memory=True),
    )


def _map(inbox: Tensor, group: PeerGroup) -> Any:
    """Map the inboxes of all ranks, and empty the one of this rank."""
    from torch.distributed import _symmetric_memory as symmetric

    with bounded_wait(group.device_group):
        handle = symmetric.rendezvous(inbox, group.device_group)
    # Another user of symmetric memory may have chosen a backend that maps less.
    if handle is None or not all(handle.buffer_ptrs):
        raise RuntimeError("PyTorch mapped no address for the inbox of a peer")
    inbox.fill_(_EMPTY)
    torch.cuda.synchronize()
    return handle


def _watch_faults(workspace: Workspace) -> None:
    """Log why a kernel gave up, for as long as the workspace exists."""
    watch = (workspace.fault, workspace.timeout_s, threading.Event())
    # It also runs when the process ends: a CUDA error ends it before the thread polls.
    weakref.finalize(workspace, _poll_fault_and_stop, *watch)
    threading.Thread(
        target=_watch, args=watch, name="symm_a2a fault watch", daemon=True
    ).start()


def fault_message(fault: Tensor, timeout_s: float) -> str:
    """Return the message for what the kernels left in ``Workspace.fault``, or ""."""
    rank, peer = (value - 1 for value in fault.tolist())
    if rank < 0:
        return ""
    return (
        f"symm_a2a: rank {rank} of its DCP group waited {timeout_s:g} s for rank {peer}, "
        "which died, stalled or issued other exchanges; this process cannot go on"
    )


def _watch(fault: Tensor, timeout_s: float, stop: threading.Event) -> None:
    # The kernel ends the CUDA context. The CUDA error that follows does not name a cause.
    while not stop.wait(_POLL_EVERY_S):
        _poll_fault(fault, timeout_s, stop)


def _poll_fault_and_stop(
    fault: Tensor, timeout_s: float, stop: threading.Event
) -> None:
    _poll_fault(fault, timeout_s, stop)
    stop.set()


def _poll_fault(fault: Tensor, timeout_s: float, stop: threading.Event) -> None:
    if not stop.is_set() and (message := fault_message(fault, timeout_s)):
        stop.set()
        logger.critical(message)
