"""The one error of this package."""

from __future__ import annotations


class PatchError(RuntimeError):
    """What stands in the way, naming the file and the way out."""
