"""Bytes of the weights that a rank holds, with those that are made of others."""

from __future__ import annotations

import gc

from torch import Tensor, nn


def weight_bytes(model: nn.Module, device: str) -> int:
    """Bytes of the tensors that live in this process, without the rotary tables of `model`.

    Call it once `model` is loaded, before there are pools. Parameters alone would not do:
    MLA's decode absorbs weights that are none, and with a replicated Q a rank holds those of
    its DCP group. A few MB of communicators' tensors count too.
    """
    # What hangs in cycles is no longer held.
    gc.collect()
    found = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        # By its type: lazy modules import what is asked of their objects.
        if issubclass(type(tensor), Tensor) and tensor.device.type == device
    }
    for module in model.modules():
        table = getattr(module, "cos_sin_cache", None)
        if isinstance(table, Tensor):
            found.pop(table.untyped_storage()._cdata, None)
    return sum(found.values())
