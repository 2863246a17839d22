"""New weights over IPC: a sender of checkpoint-engine's protocol, and a receiver for CPUs.

The protocol is that of `checkpoint_engine/worker.py`, version 0.4.2. Each rank has a socket.
The sender passes a handle of one buffer first. It fills the buffer anew for each bucket, and
sends where each tensor lies in it. Then it sends None twice: for the end of the buffer, and
for the work that SGLang does after loading.

On a GPU the server's receiver is the package's own. It needs CUDA, so `stand_in` makes a
package of that name for servers on a CPU. SGLang cannot tell CPUs apart, and its work after
loading asks for the name and the index of an accelerator. The stand-in answers both.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
import zmq

from helpers.gloo_ranks import python_path

Named = tuple[str, torch.Tensor]
# A handle of a buffer, and the buffer.
Shared = tuple[Any, torch.Tensor]

BUCKETS = 3
# Offsets of tensors in the buffer are multiples of it.
ALIGNED = 256
# Of a receiver, to answer: it joins once SGLang has imported the package.
ANSWER_S = 120
# SGLang's log, if its work after loading failed. It goes on then.
FAILED = "Post-hook processing failed"


def buckets_of(named: Sequence[Named]) -> list[Sequence[Named]]:
    """Return `BUCKETS` parts, in order.

    SGLang joins `q_a_proj` and `kv_a_proj_with_mqa` of a layer only if they come together,
    as they do in these parts of the tiny models.
    """
    size = -(-len(named) // BUCKETS)
    return [named[start : start + size] for start in range(0, len(named), size)]


def room(named: Sequence[Named]) -> int:
    """Return the bytes of the buffer that the largest bucket takes."""
    return max(sum(map(_aligned, bucket)) for bucket in buckets_of(named))


def send(address: str, shared: Shared, named: Sequence[Named]) -> None:
    """Send all weights to the rank whose receiver connects to `address`.

    Parameters
    ----------
    address : str
        Where to bind a socket of ZMQ.
    shared
        A function and its arguments, from which the receiver makes the same buffer. And the
        buffer, [room(named)] uint8, in memory that both share.
    named
        Names and tensors of a checkpoint.

    Raises
    ------
    RuntimeError
        The receiver says that it failed. It ends by itself then.
    zmq.Again
        It did not answer within `ANSWER_S`.
    """
    handle, buffer = shared
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        for option in (zmq.RCVTIMEO, zmq.SNDTIMEO, zmq.LINGER):
            socket.setsockopt(option, ANSWER_S * 1000)
        socket.bind(address)
        # The buffer is filled anew when the bucket before was answered.
        for message in chain((handle,), _filled(buffer, named), (None, None)):
            socket.send_pyobj(message)
            answer = socket.recv()
            if answer:
                error = RuntimeError(answer.decode())
                socket.send_pyobj(error)
                raise error


def _filled(
    buffer: torch.Tensor, named: Sequence[Named]
) -> Iterator[list[dict[str, Any]]]:
    """Fill the buffer by a bucket, and yield where its tensors lie. Then the next one."""
    for bucket in buckets_of(named):
        # Nothing of the last bucket may be read any more: these bytes are NaN.
        buffer.fill_(0xFF)
        offset, items = 0, []
        for name, tensor in bucket:
            flat = tensor.contiguous().flatten().view(torch.uint8)
            buffer[offset : offset + flat.numel()].copy_(flat)
            place = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype}
            items.append({**place, "offset": offset})
            offset += _aligned((name, tensor))
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        yield items


def _aligned(one: Named) -> int:
    return -(-one[1].nbytes // ALIGNED) * ALIGNED


def on_cpu(file: Path, size: int) -> Shared:
    """Return a handle and a buffer of [size] bytes, which lie in a new file."""
    file.write_bytes(bytes(size))
    return (mapped, (str(file), size)), mapped(str(file), size)


def on_gpu(index: int, size: int) -> Shared:
    """Return a handle for CUDA IPC and a buffer of [size] bytes on that GPU."""
    from torch.multiprocessing.reductions import reduce_tensor

    buffer = torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")
    return (rebuilt, reduce_tensor(buffer)[1]), buffer


def rebuilt(*arguments: Any) -> torch.Tensor:
    """Return the tensor that `reduce_tensor` gave the arguments of.

    SGLang replaces torch's function for that in a process that sent tensors (`from_tensors`).
    A handle with the new one would fail in a server that did not receive any.
    """
    from torch.multiprocessing import reductions

    tensor: torch.Tensor = reductions.rebuild_cuda_tensor(*arguments)
    return tensor


def mapped(path: str, size: int) -> torch.Tensor:
    """Return [size] uint8: the bytes of a file, which all processes see that map it."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def stand_in(folder: Path) -> dict[str, str]:
    """Environment in which SGLang finds the receiver of this file as the package's own."""
    package = folder / "checkpoint_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "worker.py").write_text(
        "from helpers.ipc_weights import tell_cpus_apart, update_weights_from_ipc\n"
        "tell_cpus_apart()\n"
    )
    return {"PYTHONPATH": python_path(folder)}


def cpu_key(rank: int) -> str:
    """Return the key of a rank in `zmq_handles`, where the server has the stand-in."""
    return f"GPU-{rank}"


def tell_cpus_apart() -> None:
    """Let SGLang take the rank for the UUID of its device."""
    from sglang.srt.platforms import current_platform

    rank = str(torch.distributed.get_rank())
    setattr(current_platform, "get_device_uuid", lambda device: rank)


def update_weights_from_ipc(
    zmq_ctx: zmq.Context[Any],
    zmq_handle: str,
    device_id: object,
    *,
    run: Callable[[list[Named]], None],
    post_hook: Optional[Callable[[], None]] = None,
) -> None:
    """Receive weights as the function of this name in `checkpoint_engine.worker` does."""
    with zmq_ctx.socket(zmq.REP) as socket:
        socket.connect(zmq_handle)
        make, arguments = socket.recv_pyobj()
        buffer = make(*arguments)
        socket.send(b"")
        while (message := socket.recv_pyobj()) is not None:
            if isinstance(message, Exception):
                raise message
            socket.send(_loaded(run, _tensors(message, buffer)))
        del buffer
        gc.collect()
        socket.send(b"")
        assert socket.recv_pyobj() is None
        _name_cpu()
        if post_hook is not None:
            post_hook()
        socket.send(b"")


def _tensors(items: Iterable[Any], buffer: torch.Tensor) -> list[Named]:
    """Views of the buffer."""
    found = []
    for item in items:
        size = item["shape"].numel() * item["dtype"].itemsize
        part = buffer[item["offset"] : item["offset"] + size]
        found.append((item["name"], part.view(item["dtype"]).view(item["shape"])))
    return found


def _loaded(run: Callable[[list[Named]], None], weights: list[Named]) -> bytes:
    """Load a bucket, and return the fault or nothing. The sender ends a failed update."""
    try:
        run(weights)
    except Exception as error:
        return repr(error).encode()
    return b""


def _name_cpu() -> None:
    from sglang.srt.checkpoint_engine import checkpoint_engine_worker

    only = SimpleNamespace(current_device=lambda: 0)
    setattr(checkpoint_engine_worker, "get_device", lambda: "cpu")
    setattr(checkpoint_engine_worker, "get_device_module", lambda: only)
