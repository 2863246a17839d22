"""Stands in for FlashMLA where it is not installed: it can be imported, and not be called.

SGLang 0.5.23 imports it in each server with a draft model, whatever the attention backend:
`sglang/srt/speculative/eagle_worker_v2.py` needs a class for an `isinstance`. A GPU machine
whose kernels are older has no FlashMLA. `benchmark/gpu_environment.sh` puts this folder on
PYTHONPATH then.
"""

from __future__ import annotations

from typing import Any, NoReturn

# Python asks `__getattr__` for them before it imports them.
_MODULES = ("flash_mla_interface", "fused_norm_rope_attn_rope_cast")


def __getattr__(name: str) -> Any:
    """Return what any public name of the real module is here: a function that raises."""
    if name.startswith("_") or name in _MODULES:
        raise AttributeError(name)

    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"flash_mla.{name} was called, but FlashMLA is not installed: this is the "
            "stand-in of benchmark/stand_ins, which can only be imported"
        )

    return call
