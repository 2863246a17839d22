"""Exchange between the peers of a rank: an all-to-all without the rank's own chunk.

Over PyNccl where it is enabled (SGLang enables it in graph capture), else over
torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from sglang_dcp.distributed.all_to_all import (
    check_apart,
    check_device,
    check_pair,
    on_wire,
    send_and_receive,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["PeerGroup", "exchange_with_peers", "one_launch"]


class PeerGroup(Protocol):
    """The part of SGLang's ``GroupCoordinator`` over which peers exchange."""

    world_size: int
    rank_in_group: int
    device_group: ProcessGroup
    cpu_group: ProcessGroup
    pynccl_comm: Any


def exchange_with_peers(
    group: PeerGroup, output: torch.Tensor, input: torch.Tensor
) -> None:
    """Send chunk j of ``input`` to peer j; chunk j of ``output`` comes from peer j.

    An all-to-all for callers that read their own chunk where it lies: it is neither
    sent, received nor copied. Peer j is the j-th of the group's ranks without this one.
    PyNccl in one launch where it is enabled (SGLang enables it in graph capture), else
    torch.distributed. Safe in graph capture: no allocation, no wait.

    Parameters
    ----------
    group
        Of at least two ranks.
    output, input : [(world_size - 1) * rows, ...]
        Equal shape, dtype and device, contiguous, not overlapping. Any dtype. May be
        empty.

    Raises
    ------
    ValueError, RuntimeError
        Unfit tensors; an NCCL error, after which its group is closed all the same.
    """
    rank, world_size = group.rank_in_group, group.world_size
    check_pair(output, input, world_size - 1)
    check_apart(output, input)
    if input.numel() == 0:
        return
    comm = group.pynccl_comm
    if comm is not None and not comm.disabled and not input.is_cpu:
        check_device(comm, input)
        peers = [peer for peer in range(world_size) if peer != rank]
        send_and_receive(comm, output, input, peers, comm._resolve_stream())
        return
    from torch.distributed import all_to_all_single

    # In elements of one dimension, so that bytes of a dtype unknown to NCCL fit too.
    received, sent = on_wire(output).view(-1), on_wire(input).view(-1)
    sizes = [sent.numel() // (world_size - 1)] * world_size
    sizes[rank] = 0
    process_group = group.cpu_group if input.is_cpu else group.device_group
    all_to_all_single(received, sent, sizes, sizes, group=process_group)


@contextmanager
def one_launch(group: PeerGroup) -> Iterator[None]:
    """Make one NCCL launch of the PyNccl calls inside, issued when the context ends.

    What they write may be read after it. Where PyNccl is not enabled nothing changes.
    The calls are the same on every rank, in the same order.
    """
    comm = group.pynccl_comm
    if comm is None or comm.disabled:
        yield
        return
    comm.nccl.ncclGroupStart()
    try:
        yield
    finally:
        # An open group would swallow every later collective of this thread.
        comm.nccl.ncclGroupEnd()
