"""Several ranks of a server on one GPU, over NCCL, in CUDA graphs.

`SGLANG_DCP_TEST_RANKS_PER_GPU` says how many ranks may share a GPU. A machine with one GPU
then runs what asks for two or four. NCCL refuses two ranks on one GPU of a host, so each
rank is a host of its own for it, and they meet over sockets. PyTorch's symmetric memory takes
ranks on one GPU if its environment allows them. Results mean what they mean on GPUs of their
own, times mean nothing.

A kernel that waits for a peer would wait until the GPU gives that peer a turn, some
milliseconds. CUDA's Multi-Process Service (MPS) runs the kernels of its clients side by side.
Each server has one of its own, because an MPS serves few clients, and all of them end with
the first that fails. Each rank gets its part of the GPU. Without that, a kernel that waits may
fill the GPU, and its peer never starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from sglang_dcp.demo.server import ServerProcess

FLAGS = "--disable-custom-all-reduce"
# An MPS that cannot serve says so and ends. Its clients would run by turns then.
ENDS_EARLY_S = 0.5
OVER_SOCKETS = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


def ranks_per_gpu() -> int:
    return int(os.environ.get("SGLANG_DCP_TEST_RANKS_PER_GPU", "1"))


def places() -> int:
    """Return how many ranks this machine has room for."""
    return torch.cuda.device_count() * ranks_per_gpu()


def are_shared_by(ranks: int) -> bool:
    """Whether so many ranks share the GPUs of this machine. A CPU has none to share."""
    return 0 < torch.cuda.device_count() < ranks


def environment(ranks: int, nodes: int = 1) -> dict[str, str]:
    """Return what the `ranks` of a server that share GPUs have in their environment.

    Ranks of several `nodes` are to find that they cannot map each other's memory.
    """
    of_one = -(-ranks // torch.cuda.device_count())
    own = {**OVER_SOCKETS, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(100 // of_one)}
    if nodes == 1:
        own["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    return own


def open_door() -> None:
    """Let the ranks of this process's server share GPUs (`helpers.doors`)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.runtime_context.publish", place_process, HookType.AROUND
    )


def place_process(
    original: Callable[..., Any], *args: Any, ranks: Any = None, **kwargs: Any
) -> Any:
    """Hook: give a rank a GPU that is there, and make it a host of its own for NCCL."""
    import msgspec
    from sglang.srt.platforms import current_platform

    if ranks is not None and ranks.gpu_id is not None:
        rank, launch = ranks.gpu_id, os.environ.get("NCCL_HOSTID", "")
        os.environ["NCCL_HOSTID"] = f"{launch}-rank-{rank}"
        setattr(current_platform, "get_device_uuid", lambda device: uuid_of(rank))
        ranks = msgspec.structs.replace(ranks, gpu_id=device_of(rank))
    return original(*args, ranks=ranks, **kwargs)


def device_of(rank: int) -> int:
    """Return the number of the GPU that a rank has, which others may have too."""
    return rank % torch.cuda.device_count()


def uuid_of(rank: int) -> str:
    """Return the UUID by which SGLang knows the GPU of a rank.

    Ranks that share a GPU have UUIDs of their own. SGLang tells ranks apart by them
    (`helpers.weight_updates.from_ipc`).
    """
    device = device_of(rank)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if device == rank else f"{uuid}-rank-{rank}"


class Mps:
    """One MPS, for the processes that have its `environment`."""

    def __init__(self) -> None:
        # A socket lies in it, and the path of one is at most 107 bytes long.
        self._folder = tempfile.mkdtemp(prefix="mps-")
        own = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        self.environment = dict.fromkeys(own, self._folder)
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {**os.environ, **self.environment}
        # It would number the GPUs anew, and its clients name them as this machine does.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._daemon = subprocess.Popen(
            ["nvidia-cuda-mps-control", "-f"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,
        )
        with suppress(subprocess.TimeoutExpired):
            ended = self._daemon.wait(timeout=ENDS_EARLY_S)
            raise RuntimeError(f"nvidia-cuda-mps-control ended with status {ended}")

    def stop(self) -> None:
        if self._daemon is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._daemon.pid, signal.SIGKILL)
            self._daemon.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class SharingServer(ServerProcess):
    """A server, and the MPS of its own that it has if its ranks share GPUs.

    Attributes
    ----------
    shared_environment : dict
        What a process needs to share memory of the GPU with its ranks.
    """

    def __init__(
        self, *args: Any, mps: Mps | None, env: Mapping[str, str], **kwargs: Any
    ) -> None:
        self._mps = mps
        self.shared_environment = mps.environment if mps is not None else {}
        env = {**env, **self.shared_environment}
        super().__init__(*args, env=env, **kwargs)

    def start(self) -> None:
        if self._mps is not None:
            self._mps.start()
        try:
            self.start_launches()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        try:
            self.stop_launches()
        finally:
            if self._mps is not None:
                self._mps.stop()

    def start_launches(self) -> None:
        super().start()

    def stop_launches(self) -> None:
        super().stop()
