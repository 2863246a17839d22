"""A door to the CUDA graph of a draft's extension, on a CPU, which has none.

The extension is the draft model's pass over what was verified. The plugin of a server makes
SGLang's own graph runner. Where a graph would be replayed, its function runs again, on the
same static buffers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BATCHES = [1, 2, 4, 8]
LINE = "replayed an extension of"


def replays_in(log: str) -> list[tuple[int, int]]:
    """Return requests and padded requests of each replay that rank 0 logged."""
    of_first = re.findall(rf"^\[[^]]*TP0[^]]*\] {LINE} (\d+) in (\d+)", log, re.M)
    return [(int(requests), int(padded)) for requests, padded in of_first]


class Reruns:
    """Stands in for SGLang's graph backend."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._functions: dict[Hashable, Callable[[], Any]] = {}

    def capture_one(self, key: Hashable, forward: Any, **ignored: Any) -> None:
        forward()
        self._functions[key] = forward

    def replay(self, key: Hashable, batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import (
            ForwardContext,
            forward_context,
        )

        with forward_context(ForwardContext(attn_backend=self._runner.attn_backend)):
            return self._functions[key]()


class Logits:
    """Stands in for SGLang's `GraphSharedOutput`."""

    def get_logits_buffer(self, vocab_size: int, *, rows: int) -> Tensor:
        return torch.zeros(rows, vocab_size)


def open_door() -> None:
    """Let drafts of this process run their extensions as replays."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker._capture_cuda_graphs",
        capture,
        HookType.AROUND,
    )


def capture(original: Callable[[Any], None], worker: Any) -> None:
    """What SGLang does on a GPU, for the extension alone."""
    from sglang.srt.speculative import eagle_worker_v2

    original(worker)
    if worker.draft_extend_attn_backend is None:
        return
    chosen = eagle_worker_v2._select_spec_graph_runner_cls(
        builtin_runner_cls=lambda: None, oot_runner_cls=lambda: None
    )
    if chosen is not None:
        worker.cuda_graph_runner_for_draft_extend = _on_cpu(chosen)(worker)


def _on_cpu(runner: type[Any]) -> type[Any]:
    """Derive from SGLang's runner one that captures nothing."""
    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as sglang

    from sglang_dcp.layers.backends.torch_native import TorchNativeBackend

    setattr(sglang, "resolve_decode_backend", Reruns)
    setattr(sglang, "get_batch_sizes_to_capture", lambda runner: (BATCHES, []))
    for name in ("init_cuda_graph_state", "init_graph_metadata"):
        setattr(TorchNativeBackend, name, lambda backend, *sizes, **more: None)

    class Rerunner(runner):  # type: ignore[misc]
        def __init__(self, worker: Any) -> None:
            worker.draft_runner.graph_shared_output = Logits()
            super().__init__(worker)

        def capture(self) -> None:
            for size in reversed(self.capture_bs):
                self.capture_one_shape(size, None)

        def execute(self, batch: Any, select_index: Any) -> Any:
            found = super().execute(batch, select_index)
            logger.info("%s %d in %d", LINE, self.raw_bs, self.bs)
            return found

    return Rerunner
