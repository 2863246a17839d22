"""Exchange between a rank and its peers: an all-to-all without the rank's local chunk.

It uses PyNccl where that is enabled, which SGLang does in graph capture. Otherwise it
uses torch.distributed.
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

__all__ = ["PeerGroup", "exchange_with_peers", "nccl_group"]


class PeerGroup(Protocol):
    """The part of SGLang's ``GroupCoordinator`` that this module uses."""

    world_size: int
    rank_in_group: int
    device_group: ProcessGroup
    cpu_group: ProcessGroup
    pynccl_comm: Any


def exchange_with_peers(
    group: PeerGroup, output: torch.Tensor, input: torch.Tensor
) -> None:
    """Send chunk j of ``input`` to peer j and receive chunk j of ``output`` from it.

    An all-to-all for callers that read their local chunk where it is. That chunk is
    neither sent, received nor copied. Peer j is the j-th rank of the group when this
    rank is left out. PyNccl does it in one launch. Safe in CUDA-graph capture: it
    neither allocates nor waits.

    Parameters
    ----------
    group
        A group of at least two ranks.
    output, input : [(world_size - 1) * rows, ...]
        Equal shape, dtype and device, contiguous, not overlapping. Any dtype. May be
        empty.

    Raises
    ------
    ValueError
        The tensors are not as described above.
    RuntimeError
        NCCL reports an error. The NCCL group is closed in this case too.
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

    # Flattened, so that the sizes also count the bytes of a dtype unknown to NCCL.
    received, sent = on_wire(output).view(-1), on_wire(input).view(-1)
    sizes = [sent.numel() // (world_size - 1)] * world_size
    sizes[rank] = 0
    process_group = group.cpu_group if input.is_cpu else group.device_group
    all_to_all_single(received, sent, sizes, sizes, group=process_group)


@contextmanager
def nccl_group(group: PeerGroup) -> Iterator[None]:
    """Join the PyNccl calls inside into one NCCL launch, issued when the context ends.

    Their results may be read after that. If PyNccl is not enabled, nothing changes.
    Every rank must make the same calls in the same order.
    """
    comm = group.pynccl_comm
    if comm is None or comm.disabled:
        yield
        return
    comm.nccl.ncclGroupStart()
    try:
        yield
    finally:
        # If the group stayed open, NCCL would issue no later call of this thread.
        comm.nccl.ncclGroupEnd()
