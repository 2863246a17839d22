"""Ranks of `symm_a2a` simulated on one GPU: inboxes in its memory, a stream a rank.

The kernels of all ranks must run at once, so a rank takes its part of the GPU only, and
whoever uses this sets `ENVIRONMENT` before CUDA starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from sglang_dcp.distributed.exchange import symm_a2a
from sglang_dcp.distributed.exchange.symm_a2a.kernel import Workspace, inbox_bytes
from sglang_dcp.distributed.exchange.symm_a2a.workspace import fault_message

T = TypeVar("T")
# Streams that share a hardware queue wait for each other.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
TIMEOUT_S = 20.0
EMPTY = 0xFF


def one_workspace(
    addresses: Sequence[int], rank: int, chunks: int, owned: object, **more: Any
) -> Workspace:
    """A rank's workspace over inboxes that exist."""
    more = {"timeout_s": TIMEOUT_S, **more}
    return Workspace(
        list(addresses),
        torch.zeros(chunks, dtype=torch.int32, device="cuda"),
        torch.zeros(2, dtype=torch.int32, pin_memory=True),
        rank,
        owned=owned,
        **more,
    )


def empty_inbox(world_size: int, chunks: int) -> torch.Tensor:
    size = inbox_bytes(world_size, chunks)
    return torch.full((size,), EMPTY, dtype=torch.uint8, device="cuda")


def loopback(world_size: int, rank: int, chunks: int) -> Workspace:
    """A rank that gets from each peer what it sends to it: one kernel, which never waits.

    Sender `rank` of the inbox of `peer` is made sender `peer` of its own inbox.
    """
    inbox = empty_inbox(world_size, chunks)
    of_sender = inbox_bytes(world_size, chunks) // (2 * world_size)
    addresses = [
        inbox.data_ptr() + (peer - rank) * of_sender for peer in range(world_size)
    ]
    addresses[rank] = inbox.data_ptr()
    return one_workspace(addresses, rank, chunks, inbox)


def exchange_over(workspace: Workspace) -> symm_a2a.SymmA2AExchange:
    """The exchange itself over a given workspace; a fallback to NCCL would raise."""
    group: Any = SimpleNamespace(
        world_size=workspace.world_size, rank_in_group=workspace.rank
    )
    with patch.object(symm_a2a, "_workspace", lambda *_: workspace):
        return symm_a2a.SymmA2AExchange(group)


class SimulatedRanks:
    """N ranks of one exchange, each with its stream."""

    def __init__(
        self, world_size: int, chunks: int, timeout_s: float = TIMEOUT_S
    ) -> None:
        properties = torch.cuda.get_device_properties(0)
        blocks = max(1, properties.multi_processor_count // world_size)
        inboxes = [empty_inbox(world_size, chunks) for _ in range(world_size)]
        addresses = [inbox.data_ptr() for inbox in inboxes]
        more = {"timeout_s": timeout_s, "max_blocks": blocks}
        self.world_size = world_size
        self.workspaces = [
            one_workspace(addresses, rank, chunks, inboxes, **more)
            for rank in range(world_size)
        ]
        self.exchanges = [exchange_over(workspace) for workspace in self.workspaces]
        self._streams = [torch.cuda.Stream() for _ in range(world_size)]
        torch.cuda.synchronize()

    def all(self, call: Callable[[int], T]) -> list[T]:
        """Results of `call(rank)`, for all ranks at once."""
        self.prepare(call)
        return self.launch(call, range(self.world_size))

    def launch(self, call: Callable[[int], T], ranks: Sequence[int]) -> list[T]:
        """`call(rank)` of what is built and allocated; RuntimeError with the faults."""
        results = []
        # These streams do not wait for the one that made the data.
        torch.cuda.synchronize()
        for rank in ranks:
            with torch.cuda.stream(self._streams[rank]):
                results.append(call(rank))
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise RuntimeError("\n".join(self.faults()) or "no fault") from error
        return results

    def faults(self) -> list[str]:
        """What kernels that gave up left, by rank."""
        every = (fault_message(w.fault, w.timeout_s) for w in self.workspaces)
        return list(filter(None, every))

    def capture(self, call: Callable[[int], T]) -> tuple[Callable[[], None], list[T]]:
        """A graph a rank: a function that replays all, and what they write."""
        self.prepare(call)
        graphs, results = [], []
        for rank, stream in enumerate(self._streams):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                results.append(call(rank))
            graphs.append(graph)

        def replay() -> None:
            self.launch(lambda rank: graphs[rank].replay(), range(self.world_size))

        return replay, results

    def prepare(self, call: Callable[[int], Any]) -> None:
        """Do everything but the exchange, before any rank waits for another.

        Compiling, loading and cudaMalloc may wait for what runs on the GPU.
        """
        with patch("cuda.bindings.driver.cuLaunchKernel", return_value=(0,)):
            self.launch(call, range(self.world_size))
