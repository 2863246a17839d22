"""Keeps a FlashInfer plan in its pinned buffer until the GPU has copied it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PlanGuard:
    """One for all wrappers of a backend.

    FlashInfer writes a plan into a pinned buffer of its wrapper and copies it to the GPU
    without waiting. Prefill chunks follow each other without a wait either, so the next
    plan could overwrite one that is not copied yet. With lengths on the device FlashInfer
    would wait for the whole GPU instead. FlashInfer 0.7 copies plans for latents from
    buffers that it makes anew; all other plans need the wait there too.
    """

    def __init__(self) -> None:
        self._copied = torch.cuda.Event()

    @contextmanager
    def before_forward(self) -> Iterator[None]:
        """Plans of a forward that is about to start; waits until the last are copied."""
        self._copied.synchronize()
        yield
        self._copied.record()

    @contextmanager
    def amid_forward(self) -> Iterator[None]:
        """Plans by the first layer of a forward, for which `before_forward` has waited."""
        yield
        self._copied.record()
