"""Plugins that also open a door: they allow in their processes what DCP does not yet serve.

A door is a module of `helpers` with a function `open_door`.
"""

from __future__ import annotations

_OPENING = """

def load():
    load_before_{door}()
    from helpers.{door} import open_door

    open_door()
"""


def with_door(plugin: str, door: str) -> str:
    """Return the source of `plugin`, which also opens `door`."""
    assert "def load():" in plugin
    inner = plugin.replace("def load():", f"def load_before_{door}():")
    return inner + _OPENING.format(door=door)
