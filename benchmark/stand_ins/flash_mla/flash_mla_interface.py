"""Stands in for a module of FlashMLA: the class that SGLang names in its types."""

from __future__ import annotations

from typing import Any


class FlashMLASchedMeta:
    """No object is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("FlashMLA is not installed: this is a stand-in for it")
