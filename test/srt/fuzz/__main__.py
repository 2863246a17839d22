"""``python -m fuzz``: random mixes of requests, or a soak, against live servers.

Without arguments 200 mixes go to each setting of `servers.SETTINGS`. A mix that fails is
made small and printed with its seed; ``--mix FILE`` runs such a mix again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

from fuzz import rest
from fuzz.client import Client, Lost
from fuzz.drive import drive, minimize
from fuzz.mixes import Mix, make_mix
from fuzz.servers import SETTINGS, Setting, pair, process_id
from fuzz.soak import soak
from sglang_dcp.demo.server import ServerProcess


def main(argv: list[str] | None = None) -> int:
    """Run what the arguments say. Returns 1 where something failed."""
    args = _parser().parse_args(argv)
    failures = 0
    for name in args.setting or SETTINGS:
        failures += _run(name, SETTINGS[name], args)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--mixes", type=int, default=200, help="mixes for each setting")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mix")
    parser.add_argument("--soak", type=float, help="soak for so many minutes instead")
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--mix", type=Path, help="file with one mix, as it was printed")
    parser.add_argument("--no-grammar", action="store_true", help="no regex, no JSON")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--flags", default="", help="more flags for the tested server")
    parser.add_argument("--models", type=Path, default=Path(".cache/fuzz/models"))
    return parser


def _run(name: str, setting: Setting, args: argparse.Namespace) -> int:
    with pair(setting, args.models, args.flags) as (tested, reference):
        begin = time.monotonic()
        try:
            failed = asyncio.run(_ask(name, setting, args, tested, reference))
        except* Lost as errors:
            for error in errors.exceptions:
                print(f"{name}: {error}\n{tested.log_tail(40)}", flush=True)
            failed = 1
        trouble = rest.log_trouble(tested.log_path)
        if trouble:
            print(f"{name}: in the log:", *trouble[:20], sep="\n")
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        return failed + bool(trouble)


async def _ask(
    name: str,
    setting: Setting,
    args: argparse.Namespace,
    tested_server: ServerProcess,
    reference_server: ServerProcess,
) -> int:
    async with (
        Client(tested_server.base_url) as tested,
        Client(reference_server.base_url) as reference,
    ):
        if args.soak:
            longest = setting.longest_prompt
            group = process_id(tested_server)
            found = await soak(tested, group, setting.ranks, longest, args.soak)
            print(f"{name}: {args.soak} minutes of soak: {found}", flush=True)
            return 0
        if args.mix:
            mixes = [Mix.from_json(args.mix.read_text())]
        else:
            limits = setting.limits(grammar=not args.no_grammar)
            seeds = range(args.seed, args.seed + args.mixes)
            mixes = [make_mix(seed, limits) for seed in seeds]
        result = await drive(tested, reference, setting, mixes)
        print(f"{name}: {result.mixes} mixes, {result.counts}", flush=True)
        for mix, faults in result.failed:
            print(f"{name}: seed {mix.seed}:", *faults, sep="\n  ", flush=True)
        if result.failed and not args.no_shrink:
            mix = result.failed[0][0]
            least = await minimize(tested, reference, setting, mix)
            print(f"{name}: the least mix of seed {mix.seed}:\n{least.to_json()}")
        return len(result.failed)


if __name__ == "__main__":
    sys.exit(main())
