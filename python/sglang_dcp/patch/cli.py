"""Command line of `python -m sglang_dcp patch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Sequence

from sglang_dcp.patch import commands
from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.export import export_series, import_series
from sglang_dcp.patch.lint import lint
from sglang_dcp.patch.manifest import versions

_ON_A_TREE = {
    "status": commands.status,
    "check": commands.check,
    "apply": commands.apply,
    "revert": commands.revert,
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; a refusal is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m sglang_dcp patch")
    verbs = parser.add_subparsers(dest="command", required=True)
    for name, run in _ON_A_TREE.items():
        command = verbs.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        command.add_argument("--target", type=Path, metavar="DIR")
    verbs.add_parser("lint", help="check headers, series, budget and hashes")
    command = verbs.add_parser("import", help="make a checkout with the series")
    command.add_argument("target", type=Path, metavar="DIR")
    command.add_argument("--version", default=versions()[-1] if versions() else None)
    command = verbs.add_parser("export", help="make the series of a checkout")
    command.add_argument("--target", type=Path, metavar="DIR", required=True)
    command.add_argument("--base", default="base", metavar="REV")
    command.add_argument("--wheel", type=Path, metavar="FILE", required=True)
    try:
        return _run(parser.parse_args(arguments))
    except PatchError as error:
        print(f"sglang-dcp: error: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    if parsed.command in _ON_A_TREE:
        return _ON_A_TREE[parsed.command](parsed.target)
    if parsed.command == "lint":
        return lint()
    if parsed.command == "import":
        return import_series(parsed.target, parsed.version)
    return export_series(parsed.target, parsed.base, parsed.wheel)
