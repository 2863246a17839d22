"""The one error of the patch tool."""

from __future__ import annotations


class PatchError(RuntimeError):
    """The tool cannot go on. The message names the file and what to do."""
