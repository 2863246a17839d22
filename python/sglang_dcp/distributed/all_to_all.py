"""All-to-all with equal splits for SGLang's two levels of communication.

SGLang 0.5.16 has no all-to-all on PyNccl, and that of ``GroupCoordinator`` goes over
torch.distributed only. Later releases have both; the seams here are for those that
do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ContextManager

if TYPE_CHECKING:
    import torch
    from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator
    from sglang.srt.distributed.parallel_state import GroupCoordinator

__all__ = [
    "group_all_to_all_single",
    "pynccl_all_to_all_single",
]


def pynccl_all_to_all_single(
    comm: PyNcclCommunicator,
    output: torch.Tensor,
    input: torch.Tensor,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Send chunk p of ``input`` to rank p; chunk p of ``output`` comes from rank p.

    One NCCL group of sends and receives; the rank's own chunk is copied on the same
    stream. Safe in graph capture: no allocation, no wait. Returns at once when the
    communicator is disabled, as its other methods do.

    Parameters
    ----------
    comm
        Communicator of SGLang; chunks are in the order of its ranks.
    output, input : [world_size * rows, ...]
        Equal shape and dtype, contiguous, not overlapping, on ``comm.device``. Any
        dtype: one that NCCL cannot name travels as bytes. May be empty.
    stream
        The current one if None; else the caller orders it against the tensors' use.

    Raises
    ------
    ValueError, RuntimeError
        Unfit tensors; an NCCL error, after which its group is closed all the same.
    """
    if comm.disabled:
        return
    check_pair(output, input, comm.world_size)
    if comm.world_size > 1:
        check_apart(output, input)
    check_device(comm, input)
    if input.numel() == 0:
        return
    queue = comm._resolve_stream() if stream is None else stream
    _copy_own_chunk(output, input, comm.rank, comm.world_size, stream)
    send_and_receive(comm, output, input, range(comm.world_size), queue)


def group_all_to_all_single(
    group: GroupCoordinator, output: torch.Tensor, input: torch.Tensor
) -> None:
    """Send chunk p of ``input`` to rank p; chunk p of ``output`` comes from rank p.

    Stands in for ``GroupCoordinator.all_to_all_single``. PyNccl is used where it is
    enabled (SGLang enables it in graph capture), else torch.distributed. Unlike the
    public method of SGLang, whose custom op has a CUDA kernel only, this can be
    called with CPU tensors. Safe in CUDA graph capture.

    Parameters
    ----------
    group
        Chunks are in the order of ``group.ranks``.
    output, input : [world_size * rows, ...]
        Equal shape, dtype and device, contiguous, not overlapping. Any dtype.

    Raises
    ------
    ValueError
        The tensors do not meet the above.
    """
    comm = group.pynccl_comm
    if comm is not None and not comm.disabled and not input.is_cpu:
        pynccl_all_to_all_single(comm, output, input)
        return
    check_pair(output, input, group.world_size)
    if group.world_size == 1:
        output.copy_(input)
        return
    check_apart(output, input)
    if input.numel():
        from torch.distributed import all_to_all_single

        # Gloo on both levels in SGLang's CPU mode; on GPU the device group is NCCL,
        # which takes no CPU tensor.
        process_group = group.cpu_group if input.is_cpu else group.device_group
        all_to_all_single(on_wire(output), on_wire(input), group=process_group)


def check_device(comm: PyNcclCommunicator, input: torch.Tensor) -> None:
    """ValueError for a tensor on another device than the communicator's."""
    if input.device != comm.device:
        raise ValueError(
            f"This communicator works on {comm.device}, the tensors are on "
            f"{input.device}; pass tensors on the communicator's device."
        )


def check_pair(output: torch.Tensor, input: torch.Tensor, chunks: int) -> None:
    """ValueError unless both are contiguous, alike and ``chunks`` equal chunks."""
    for name, tensor in (("output", output), ("input", input)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"an all-to-all needs a contiguous {name}; got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}."
            )
    for what in ("shape", "dtype", "device"):
        seen, wanted = getattr(output, what), getattr(input, what)
        if seen != wanted:
            raise ValueError(
                "an all-to-all needs output and input alike; the output has "
                f"{what} {seen}, the input {wanted}."
            )
    if input.dim() == 0 or input.shape[0] % chunks:
        raise ValueError(
            f"an all-to-all cuts dim 0 into {chunks} equal chunks, one per rank "
            f"that takes part; shape {tuple(input.shape)} does not split so."
        )


def check_apart(output: torch.Tensor, input: torch.Tensor) -> None:
    """ValueError for tensors of equal size that share memory."""
    size_bytes = input.numel() * input.element_size()
    if abs(output.data_ptr() - input.data_ptr()) < size_bytes:
        raise ValueError(
            "an all-to-all cannot work in place: output and input share memory, so "
            "a chunk could be overwritten before it is sent."
        )


def send_and_receive(
    comm: PyNcclCommunicator,
    output: torch.Tensor,
    input: torch.Tensor,
    ranks: Sequence[int],
    stream: torch.cuda.Stream,
) -> None:
    """One NCCL group: chunk i to and from ``ranks[i]``, the own rank left out."""
    from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

    count = input.numel() // len(ranks)
    step = count * input.element_size()
    datatype = _nccl_datatype(input.dtype)
    if datatype is None:
        count, datatype = step, wrapper.ncclDataTypeEnum.ncclUint8
    tail = (comm.comm, wrapper.cudaStream_t(stream.cuda_stream))
    source, target = input.data_ptr(), output.data_ptr()
    comm.nccl.ncclGroupStart()
    try:
        for place, peer in enumerate(ranks):
            if peer == comm.rank:
                continue
            chunk = wrapper.buffer_type(source + place * step)
            comm.nccl.ncclSend(chunk, count, datatype, peer, *tail)
            chunk = wrapper.buffer_type(target + place * step)
            comm.nccl.ncclRecv(chunk, count, datatype, peer, *tail)
    finally:
        # An open group would swallow every later collective of this thread.
        comm.nccl.ncclGroupEnd()


def _nccl_datatype(dtype: torch.dtype) -> int | None:
    from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

    try:
        return wrapper.ncclDataTypeEnum.from_torch(dtype)
    except ValueError:
        return None


def on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as NCCL and gloo can name it: itself, or its bytes."""
    import torch

    if _nccl_datatype(tensor.dtype) is not None:
        return tensor
    # Flattened first: a last dim of size 1 may be contiguous with any stride, and
    # such a stride cannot be viewed as bytes.
    return tensor.view(-1).view(torch.uint8)


def _copy_own_chunk(
    output: torch.Tensor,
    input: torch.Tensor,
    rank: int,
    world_size: int,
    stream: torch.cuda.Stream | None,
) -> None:
    import torch

    rows = input.shape[0] // world_size
    scope: ContextManager[Any] = nullcontext()
    if stream is not None:
        scope = torch.get_device_module(input.device).stream(stream)
    with scope:
        output.narrow(0, rank * rows, rows).copy_(input.narrow(0, rank * rows, rows))
