"""Plugins of servers that a benchmark starts: one that it brings, or doors of the live tests.

A door lets a server do what DCP keeps closed until it was compared and timed on GPUs
(`test/srt/helpers/*_door.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from decode_layouts import Layout

# Doors of what is off until it was timed.
TIMED = (
    "prefill_groups_door",
    "short_prefill_door",
    "latents_in_graphs_door",
)
# Ends the names of layouts whose servers open doors.
OPENED = "+doors"
TESTS = Path(__file__).resolve().parent.parent / "test" / "srt"


def plugin_env(folder: Path, name: str, source: str) -> dict[str, str]:
    """Return the environment of a server that loads `source` as plugin `name`.

    `folder` is made.
    """
    add_tests()
    from helpers.servers import plugin_folder

    folder.mkdir(parents=True)
    path = plugin_folder(folder, name, source)["PYTHONPATH"]
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (path, inherited)))}


def source_of(doors: Sequence[str]) -> str:
    """Return the source of a plugin that opens `doors`, modules of `helpers`."""
    add_tests()
    from helpers.doors import with_door

    source = "def load(): ...\n"
    for door in doors:
        source = with_door(source, door)
    return source


def add_doors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--doors",
        nargs="*",
        default=[],
        choices=TIMED,
        help="doors of the live tests; each layout with DCP gets a second server, which "
        "does what is off",
    )


def open_layouts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Add the layouts whose servers open the doors that were asked for, if any."""
    if not options.doors:
        return
    closed = options.layouts
    options.layouts = list(with_opened(closed))
    if len(options.layouts) == len(closed):
        parser.error("--doors: no layout loads this package")


def with_opened(layouts: Iterable[Layout]) -> Iterator[Layout]:
    """Yield the layouts, and after each that loads this package one with open doors."""
    for layout in layouts:
        yield layout
        if layout.dcp_size > 1 and not layout.is_upstream:
            yield layout._replace(name=layout.name + OPENED)


def opened_env(folder: Path, layout: Layout, doors: Sequence[str]) -> dict[str, str]:
    """Return the environment of a layout's server, which opens `doors` if its name says so."""
    if not layout.name.endswith(OPENED):
        return {}
    own = folder / f"doors-{layout.name}".replace(":", "-")
    return plugin_env(own, "open_doors", source_of(doors))


def add_tests() -> None:
    """Let this process import `helpers` of the live tests."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
