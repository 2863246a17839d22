"""The inner backend of each `--attention-backend` name."""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.layers.backends.base import InnerBackend
from sglang_dcp.layers.backends.capabilities import Mismatch, Requirement, compare
from sglang_dcp.layers.backends.fa3 import Fa3Backend
from sglang_dcp.layers.backends.fa3_mla import Fa3MlaBackend
from sglang_dcp.layers.backends.flashinfer import FlashInferBackend
from sglang_dcp.layers.backends.flashinfer_mla import FlashInferMlaBackend
from sglang_dcp.layers.backends.torch_native import TorchNativeBackend
from sglang_dcp.layers.backends.triton import TritonBackend

# Best first.
GQA_BACKENDS: dict[str, type[InnerBackend]] = {
    "fa3": Fa3Backend,
    "flashinfer": FlashInferBackend,
    "triton": TritonBackend,
    "torch_native": TorchNativeBackend,
}
MLA_BACKENDS: dict[str, type[InnerBackend]] = {
    "fa3": Fa3MlaBackend,
    "flashinfer": FlashInferMlaBackend,
    "torch_native": TorchNativeBackend,
}

# Names that a user may expect here, and why they have no inner backend.
_WITHOUT_BACKEND = {
    "flashmla": "its decode kernel was not tried on shards without a key",
}


def backends(mla: bool) -> dict[str, type[InnerBackend]]:
    """Return the inner backends by `--attention-backend` name, best first."""
    return MLA_BACKENDS if mla else GQA_BACKENDS


def backend_class(name: str, mla: bool) -> type[InnerBackend]:
    """Return the inner backend of an `--attention-backend`."""
    return backends(mla)[name]


def split_below(args: Any, mla: bool) -> float:
    """Return `splits_ragged_below` of a server with these arguments."""
    if args.enable_deterministic_inference:
        return 0
    return backend_class(args.attention_backend, mla).splits_ragged_below


def find_mismatch(name: str, requirement: Requirement) -> Optional[Mismatch]:
    """Return why backend `name` cannot serve `requirement`, or None if it can."""
    found = backends(requirement.mla).get(name)
    on_cpu = requirement.device == "cpu"
    if found is None or (on_cpu and not found.capabilities.cpu):
        where = f"device {requirement.device}"
        where += " with latent attention" * requirement.mla
        reason = f"this version has no DCP backend for it on {where}"
        return Mismatch("--attention-backend", name, _WITHOUT_BACKEND.get(name, reason))
    return compare(name, found.capabilities, requirement)


def backend_names(requirement: Requirement) -> list[str]:
    """List the attention backends that can serve `requirement`, best first."""
    names = backends(requirement.mla)
    return [name for name in names if find_mismatch(name, requirement) is None]
