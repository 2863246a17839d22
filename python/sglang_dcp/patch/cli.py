"""Command line of `python -m sglang_dcp patch`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Sequence

from sglang_dcp.patch import commands
from sglang_dcp.patch.error import PatchError
from sglang_dcp.patch.export import export_series, import_series
from sglang_dcp.patch.lint import lint
from sglang_dcp.releases.installed import sglang_version

_ON_A_TREE = {
    "status": commands.status,
    "check": commands.check,
    "apply": commands.apply,
    "revert": commands.revert,
}


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `patch` to its parser."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for name, run in _ON_A_TREE.items():
        command = verbs.add_parser(name, help=(run.__doc__ or "").splitlines()[0])
        command.add_argument("--target", type=Path, metavar="DIR")
    verbs.add_parser("lint", help="Check headers, series, budget and hashes.")
    command = verbs.add_parser("import", help="Make a checkout with the series.")
    command.add_argument("target", type=Path, metavar="DIR")
    command.add_argument("--version", help="Default: that of the installed SGLang.")
    command = verbs.add_parser("export", help="Make the series of a checkout.")
    command.add_argument("--target", type=Path, metavar="DIR", required=True)
    command.add_argument("--base", default="base", metavar="REV")
    command.add_argument("--wheel", type=Path, metavar="FILE", required=True)


def main(arguments: Sequence[str]) -> int:
    """Run one command. An error prints one line and exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m sglang_dcp patch")
    add_commands(parser)
    return run(parser.parse_args(arguments))


def run(parsed: argparse.Namespace) -> int:
    """Do what `main` does, for parsed arguments."""
    try:
        return _run(parsed)
    except PatchError as error:
        print(f"sglang-dcp: error: {error}", file=sys.stderr)
        return 2


def _run(parsed: argparse.Namespace) -> int:
    if parsed.verb in _ON_A_TREE:
        return _ON_A_TREE[parsed.verb](parsed.target)
    if parsed.verb == "lint":
        return lint()
    if parsed.verb == "import":
        return import_series(parsed.target, parsed.version or _installed())
    return export_series(parsed.target, parsed.base, parsed.wheel)


def _installed() -> str:
    try:
        return sglang_version()
    except PackageNotFoundError:
        raise PatchError("cannot tell the version of sglang; pass --version") from None
