"""Several launches that serve as one, each with GPUs of its own of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.shared_gpus import OVER_SOCKETS, Mps, SharingServer, ranks_per_gpu
from sglang_dcp.demo.server import ServerProcess, free_port


class FirstNode(SharingServer):
    """Node 0, which has the HTTP server. The other nodes start and stop with it."""

    def __init__(
        self, *args: Any, others: Sequence[ServerProcess], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.others = tuple(others)

    def start_launches(self) -> None:
        super().start_launches()
        for node in self.others:
            node.start()

    def stop_launches(self) -> None:
        try:
            super().stop_launches()
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
    """Return node 0 of `nodes`, not started, for `gpus` ranks on the first GPUs.

    NCCL takes the launches for hosts of their own, which it reaches over sockets. SGLang
    would take them for one host, and its own all-reduce would look for GPUs that a launch
    does not see.
    """
    meet = f"--nnodes {nodes} --dist-init-addr 127.0.0.1:{free_port()}"
    common = [*flags, *meet.split(), "--disable-custom-all-reduce"]
    seen = (visible_gpus() * ranks_per_gpu())[:gpus]
    share = len(seen) // nodes
    mps = Mps() if len(set(seen)) < len(seen) else None
    shared = mps.environment if mps else {}

    def options(rank: int) -> dict[str, Any]:
        own_gpus = seen[rank * share : (rank + 1) * share]
        own = {
            "CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(own_gpus)),
            "NCCL_HOSTID": f"node-{rank}",
            **OVER_SOCKETS,
        }
        name = "server.log" if rank == 0 else f"node-{rank}.log"
        return {
            "args": [*common, "--node-rank", str(rank)],
            "log_path": folder / name,
            "env": {**env, **shared, **own},
            "grace": 0.0,
            "device": "cuda",
        }

    others = [ServerProcess(model, **options(rank)) for rank in range(1, nodes)]
    return FirstNode(model, others=others, mps=mps, **options(0))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
