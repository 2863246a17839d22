"""The K weights that MLA's decode absorbs into Q, of all ranks of a DCP group.

SGLang derives them from `kv_b_proj` once it is loaded, in the form that its kernel takes:

- `w_kc` in 16 bit, also from weights in blocks of fp8, from int8 and from AWQ;
- `w_kc` in fp8 with one scale, `w_scale`, that each rank computes from its own heads;
- `w_kc` in fp8 with a scale for each block, `w_scale_k` (`SGLANG_USE_DEEPGEMM_BMM`).

A rank's one scale is wrong for the heads of another rank. So in the second form the
weights are gathered in 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sglang_dcp.layers.estimates import Product


class AbsorbedK:
    """`w_kc` of one attention module of DeepSeek, and of its DCP group.

    Parameters
    ----------
    module
        SGLang's attention module, loaded.
    dtype : torch.dtype
        Dtype of queries.
    group
        DCP group, in head order.
    """

    def __init__(self, module: Any, dtype: torch.dtype, group: Any) -> None:
        self._module = module
        self._dtype = dtype
        self._group = group
        self._of_all: dict[str, torch.Tensor] = {}

    def own_product(self, dtype: torch.dtype) -> Product:
        """Return the rank's own product. A latent of each head comes out, in `dtype`."""
        whole = self._of_all["w_kc"]
        heads, inputs, latent = whole.shape
        own = heads // self._group.world_size
        stored = sum(tensor.nbytes for tensor in self._of_all.values())
        share = stored / self._group.world_size
        return Product(inputs, own * latent, share, dtype)

    def refresh(self) -> None:
        """Gather the weights of all ranks; a collective.

        The gathered tensors keep their addresses. The module's own become views of them
        where they have the same form, so that no weight is held twice.
        """
        module = self._module
        names = ["w_kc", *(["w_scale_k"] if module.w_scale_k is not None else ())]
        one_scale = module.w_kc.itemsize == 1 and module.w_scale_k is None
        for name in names:
            own = getattr(module, name)
            if one_scale:
                own = (own.float() * module.w_scale).to(self._dtype)
            whole = gather_heads(own, self._group)
            if name in self._of_all:
                whole = self._of_all[name].copy_(whole)
            self._of_all[name] = whole
            if not one_scale:
                heads = len(own)
                first = self._group.rank_in_group * heads
                setattr(module, name, whole[first : first + heads])

    @contextmanager
    def of_all_ranks(self) -> Iterator[None]:
        """Show the module the weights of all ranks."""
        own = {name: getattr(self._module, name) for name in self._of_all}
        self._show(self._of_all)
        try:
            yield
        finally:
            self._show(own)

    def _show(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self._module, name, tensor)


def gather_heads(own: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather [heads, x, y] of all ranks, in rank order and in the same memory layout.

    Kernels for fp8 ask for their own layout: rows of `x` in the last dimension, or of `y`.
    """
    swapped = not own.is_contiguous()
    rows = (own.transpose(1, 2) if swapped else own).contiguous()
    # fp8 goes as bytes, because not every communicator knows the dtype.
    raw = rows if rows.itemsize > 1 else rows.view(torch.uint8)
    whole: torch.Tensor = group.all_gather(raw, dim=0)
    whole = whole.view(rows.dtype)
    return whole.transpose(1, 2) if swapped else whole
