"""Counts the bytes of tensors that live at once, by torch's dispatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is active, notes the most bytes that new tensors held at once.

    Tensors from before count nothing, nor do views of them.

    Attributes
    ----------
    peak : int
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Optional[Mapping[str, Any]] = None,
    ) -> Any:
        self._drop_dead()
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._add(tensor, new=True)
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return out

    def _drop_dead(self) -> None:
        dead = [key for key, (storage, _) in self._known.items() if storage.expired()]
        for key in dead:
            del self._known[key]

    def _add(self, tensor: torch.Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() if new else 0
        self._known.setdefault(storage._cdata, (StorageWeakRef(storage), size))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
