"""All-to-all with equal splits for SGLang's two levels of communication.

SGLang 0.5.16 has no all-to-all on PyNccl, and that of ``GroupCoordinator`` goes over
torch.distributed only. Later releases have both; the seams here are for those that
do not.
"""

from __future__ import annotations

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
    _check_pair(output, input, comm.world_size)
    if input.device != comm.device:
        raise ValueError(
            f"This communicator works on {comm.device}, the tensors are on "
            f"{input.device}; pass tensors on the communicator's device."
        )
    if input.numel() == 0:
        return
    queue = comm._resolve_stream() if stream is None else stream
    _copy_own_chunk(output, input, comm.rank, comm.world_size, stream)
    _exchange_with_peers(comm, output, input, queue)


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
    _check_pair(output, input, group.world_size)
    if group.world_size == 1:
        output.copy_(input)
    elif input.numel():
        from torch.distributed import all_to_all_single

        # Gloo on both levels in SGLang's CPU mode; on GPU the device group is NCCL,
        # which takes no CPU tensor.
        process_group = group.cpu_group if input.is_cpu else group.device_group
        all_to_all_single(_on_wire(output), _on_wire(input), group=process_group)


def _check_pair(output: torch.Tensor, input: torch.Tensor, world_size: int) -> None:
    for name, tensor in (("output", output), ("input", input)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"all_to_all_single needs a contiguous {name}; got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}."
            )
    for what in ("shape", "dtype", "device"):
        seen, wanted = getattr(output, what), getattr(input, what)
        if seen != wanted:
            raise ValueError(
                "all_to_all_single needs output and input alike; the output has "
                f"{what} {seen}, the input {wanted}."
            )
    if input.dim() == 0 or input.shape[0] % world_size:
        raise ValueError(
            f"all_to_all_single cuts dim 0 into {world_size} equal chunks, one per "
            f"rank; shape {tuple(input.shape)} does not split so."
        )
    size_bytes = input.numel() * input.element_size()
    if world_size > 1 and abs(output.data_ptr() - input.data_ptr()) < size_bytes:
        raise ValueError(
            "all_to_all_single cannot work in place: output and input share memory, "
            "so a chunk could be overwritten before it is sent."
        )


def _exchange_with_peers(
    comm: PyNcclCommunicator,
    output: torch.Tensor,
    input: torch.Tensor,
    stream: torch.cuda.Stream,
) -> None:
    from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

    count = input.numel() // comm.world_size
    step = count * input.element_size()
    datatype = _nccl_datatype(input.dtype)
    if datatype is None:
        count, datatype = step, wrapper.ncclDataTypeEnum.ncclUint8
    tail = (comm.comm, wrapper.cudaStream_t(stream.cuda_stream))
    source, target = input.data_ptr(), output.data_ptr()
    comm.nccl.ncclGroupStart()
    try:
        for peer in range(comm.world_size):
            if peer == comm.rank:
                continue
            chunk = wrapper.buffer_type(source + peer * step)
            comm.nccl.ncclSend(chunk, count, datatype, peer, *tail)
            chunk = wrapper.buffer_type(target + peer * step)
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


def _on_wire(tensor: torch.Tensor) -> torch.Tensor:
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
