"""Memory of ``symm_a2a``: one inbox for each rank, mapped by all ranks of the DCP group.

PyTorch's symmetric memory allocates and maps the inboxes. NVLink multicast is not used.
"""

from __future__ import annotations

import logging
import socket
import threading
import weakref

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import PeerGroup
from sglang_dcp.distributed.exchange.symm_a2a.kernel import Workspace, inbox_bytes

logger = logging.getLogger(__name__)

_EMPTY = 0xFF
_POLL_EVERY_S = 0.2


def unreachable_peer(group: PeerGroup) -> str:
    """Return why a rank of the group cannot store to another one, or "".

    It is a collective over ``group.cpu_group``. The answer is the same on all ranks.
    """
    device = torch.cuda.current_device()
    mine = (socket.gethostname(), device)
    everyone: list[tuple[str, int]] = [mine] * group.world_size
    torch.distributed.all_gather_object(everyone, mine, group=group.cpu_group)
    faults = [""] * group.world_size
    torch.distributed.all_gather_object(
        faults, _first_unreachable(mine, everyone), group=group.cpu_group
    )
    return next(filter(None, faults), "")


def _first_unreachable(mine: tuple[str, int], everyone: list[tuple[str, int]]) -> str:
    host, device = mine
    # PyTorch takes the two for one GPU and raises.
    if everyone.count(mine) > 1:
        return f"ranks share GPU {device} of {host}, or each sees one GPU alone"
    for other_host, other in everyone:
        if other_host != host:
            return f"{host} and {other_host} are two nodes"
        if other != device and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device} cannot access the memory of GPU {other}"
    return ""


def make_workspace(group: PeerGroup, chunks: int, timeout_s: float) -> Workspace:
    """Allocate, map and empty the inboxes.

    It is a collective, and must run before any capture.

    Parameters
    ----------
    group : ranks that can all reach each other
    chunks : capacity of an inbox, the same on all ranks
    timeout_s : seconds that a kernel waits for a peer
    """
    from torch.distributed import _symmetric_memory as symmetric

    # The rendezvous takes no inference tensors.
    with torch.inference_mode(False):
        inbox = symmetric.empty(
            inbox_bytes(group.world_size, chunks),
            dtype=torch.uint8,
            device=torch.device("cuda", torch.cuda.current_device()),
        )
        handle = symmetric.rendezvous(inbox, group.device_group)
        inbox.fill_(_EMPTY)
        uses = torch.zeros(chunks, dtype=torch.int32, device=inbox.device)
        fault = torch.zeros(2, dtype=torch.int32, pin_memory=True)
    # No rank may store before every inbox is empty.
    torch.cuda.synchronize()
    torch.distributed.barrier(group=group.cpu_group)
    workspace = Workspace(
        list(handle.buffer_ptrs),
        uses,
        fault,
        group.rank_in_group,
        timeout_s,
        owned=(handle, inbox),
    )
    _watch_faults(workspace)
    return workspace


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
