"""Several launches that serve as one, each with GPUs of its own of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_dcp.demo.server import ServerProcess, free_port


class FirstNode(ServerProcess):
    """Node 0, which has the HTTP server. The other nodes start and stop with it."""

    def __init__(
        self, *args: Any, others: Sequence[ServerProcess], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.others = tuple(others)

    def start(self) -> None:
        super().start()
        for node in self.others:
            node.start()

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            for node in self.others:
                node.stop()


def make_nodes(
    model: Path,
    flags: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    nodes: int,
    gpus: int,
) -> FirstNode:
    """Return node 0 of `nodes`, not started, over the first `gpus` GPUs.

    NCCL takes the launches for hosts of their own, which it reaches over sockets. SGLang
    would take them for one host, and its own all-reduce would look for GPUs that a launch
    does not see.
    """
    meet = f"--nnodes {nodes} --dist-init-addr 127.0.0.1:{free_port()}"
    common = [*flags, *meet.split(), "--disable-custom-all-reduce"]
    seen = visible_gpus()[:gpus]
    share = len(seen) // nodes

    def options(rank: int) -> dict[str, Any]:
        own = {
            "CUDA_VISIBLE_DEVICES": ",".join(seen[rank * share : (rank + 1) * share]),
            "NCCL_HOSTID": f"node-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
        }
        name = "server.log" if rank == 0 else f"node-{rank}.log"
        return {
            "args": [*common, "--node-rank", str(rank)],
            "log_path": folder / name,
            "env": {**env, **own},
            "grace": 0.0,
            "device": "cuda",
        }

    others = [ServerProcess(model, **options(rank)) for rank in range(1, nodes)]
    return FirstNode(model, others=others, **options(0))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
