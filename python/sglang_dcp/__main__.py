"""`python -m sglang_dcp`: the hooks of this machine, and patches for forks of SGLang."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from sglang_dcp import __version__
from sglang_dcp.patch import cli as patch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_dcp", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "Print every hook; exit with 0 if a server with DCP flags would start."
    commands.add_parser("status", help=text, description=text)
    text = "Record the hashes of the installed SGLang, a fork of a known release."
    commands.add_parser("record", help=text, description=text)
    text = "Print what changed for the hooks; exit with 1 if one no longer fits."
    command = commands.add_parser("compare", help=text, description=text)
    for side in ("old", "new"):
        text = "a wheel of SGLang, or a folder with the package"
        command.add_argument(side, type=Path, metavar=side.upper(), help=text)
        text = "for a folder that does not tell its version"
        command.add_argument(f"--{side}-version", metavar="X.Y.Z", help=text)
    text = "Write the hooks into SGLang's source, and take them out again."
    patch.add_commands(commands.add_parser("patch", help=text, description=text))
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Only `status` and `record` import SGLang and torch."""
    parsed = _parser().parse_args(arguments)
    if parsed.command == "patch":
        return patch.run(parsed)
    if parsed.command == "compare":
        from sglang_dcp.hooks.compare import compare

        return compare(parsed.old, parsed.new, parsed.old_version, parsed.new_version)
    from sglang_dcp.hooks import commands

    return {"status": commands.status, "record": commands.record}[parsed.command]()


if __name__ == "__main__":
    sys.exit(main())
