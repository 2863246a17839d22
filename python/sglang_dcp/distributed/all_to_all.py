"""All-to-all with equal splits, for SGLang's communicators and for its groups.

SGLang 0.5.16 has no all-to-all on PyNccl. That of ``GroupCoordinator`` goes through
torch.distributed only, and only on CUDA. Later releases have both. The two public
functions here add them to 0.5.16, for code of other projects.
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
    """Send chunk p of ``input`` to rank p and receive chunk p of ``output`` from it.

    Public API, installed as ``PyNcclCommunicator.all_to_all_single``. It is for code of
    other projects that calls SGLang's communicators on 0.5.16, which lacks this method.
    The exchanges of this package use ``all_to_all_peers``.

    One NCCL group holds all sends and receives. The rank's local chunk is copied on the
    same stream. Safe in CUDA-graph capture: it neither allocates nor waits. It returns
    at once if the communicator is disabled, as the other methods do.

    Parameters
    ----------
    comm
        SGLang's communicator. Chunks are in the order of its ranks.
    output, input : [world_size * rows, ...]
        Equal shape and dtype, contiguous, not overlapping, on ``comm.device``. Any
        dtype: one that NCCL does not know travels as bytes. May be empty.
    stream
        None takes the current stream. For another one, the caller orders it against
        other uses of the tensors.

    Raises
    ------
    ValueError
        The tensors are not as described above.
    RuntimeError
        NCCL reports an error. The NCCL group is closed in this case too.
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
    """Send chunk p of ``input`` to rank p and receive chunk p of ``output`` from it.

    Public API, installed as ``GroupCoordinator.all_to_all_single`` while DCP is on. It is
    for code of other projects that calls SGLang's communicators on 0.5.16. SGLang's method
    there lacks PyNccl, and its custom op has no CPU kernel. The exchanges of this package
    use ``all_to_all_peers``.

    PyNccl is used where it is enabled, which SGLang does in graph capture. Otherwise
    torch.distributed is used. Safe in CUDA-graph capture.

    Parameters
    ----------
    group
        SGLang's group. Chunks are in the order of ``group.ranks``.
    output, input : [world_size * rows, ...]
        Equal shape, dtype and device, contiguous, not overlapping. Any dtype. May be
        empty.

    Raises
    ------
    ValueError
        The tensors are not as described above.
    RuntimeError
        NCCL reports an error. The NCCL group is closed in this case too.
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

        # On GPU the device group is NCCL, which takes no CPU tensor. In SGLang's CPU
        # mode both groups are gloo.
        process_group = group.cpu_group if input.is_cpu else group.device_group
        all_to_all_single(on_wire(output), on_wire(input), group=process_group)


def check_device(comm: PyNcclCommunicator, input: torch.Tensor) -> None:
    """Raise ValueError for a tensor on another device than the communicator's."""
    if input.device != comm.device:
        raise ValueError(
            f"This communicator works on {comm.device}, the tensors are on "
            f"{input.device}; pass tensors on the communicator's device."
        )


def check_pair(output: torch.Tensor, input: torch.Tensor, chunks: int) -> None:
    """Raise ValueError unless both are alike, contiguous, and split into ``chunks``."""
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
    """Raise ValueError if two tensors of equal size share memory."""
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
    """Send chunk i to ``ranks[i]`` and receive chunk i from it, in one NCCL group.

    This rank is left out where ``ranks`` holds it.
    """
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
        # If the group stayed open, NCCL would issue no later call of this thread.
        comm.nccl.ncclGroupEnd()


def _nccl_datatype(dtype: torch.dtype) -> int | None:
    from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

    try:
        return wrapper.ncclDataTypeEnum.from_torch(dtype)
    except ValueError:
        return None


def on_wire(tensor: torch.Tensor) -> torch.Tensor:
    """View a contiguous tensor in a dtype that NCCL and gloo know: itself, or its bytes."""
    import torch

    if _nccl_datatype(tensor.dtype) is not None:
        return tensor
    # Flattened first: a last dim of size 1 counts as contiguous with any stride, and
    # torch cannot view such a stride as bytes.
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
