"""``python -m fuzz``: random mixes of requests, or a soak, against live servers.

Without arguments 200 mixes go to each setting of `servers.SETTINGS`, or with
``--device cuda`` to each of `cuda.SETTINGS`. A mix that fails is made small and printed
with its seed; ``--mix FILE`` sends such a mix again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fuzz import cuda, rest, servers
from fuzz.client import Client, Lost
from fuzz.drive import drive, minimize
from fuzz.mixes import Mix, make_mix
from fuzz.servers import Setting
from fuzz.soak import soak
from sglang_dcp.demo.server import ServerProcess


def main(argv: list[str] | None = None) -> int:
    """Run what the arguments say. Returns 1 where something failed."""
    args = _parser().parse_args(argv)
    known = _settings(args.device)
    names = args.setting or list(known)
    if unknown := [name for name in names if name not in known]:
        print(f"no setting {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    failed = [name for name in names if _fails(name, known[name], args)]
    print(f"failed: {', '.join(failed) or 'none'} of {', '.join(names)}")
    return 1 if failed else 0


def _settings(device: str) -> Mapping[str, Setting]:
    return cuda.SETTINGS if device == "cuda" else servers.SETTINGS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixes", type=int, default=200, help="mixes for each setting")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mix")
    parser.add_argument("--together", type=int, default=3, help="mixes at once")
    parser.add_argument("--soak", type=float, help="soak for so many minutes instead")
    parser.add_argument("--setting", action="append", help="may be given several times")
    parser.add_argument("--mix", type=Path, help="file with one mix, as it was printed")
    parser.add_argument("--no-grammar", action="store_true", help="no regex, no JSON")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--door", help="door for the tested server, on a CPU")
    parser.add_argument("--flags", default="", help="more flags for the tested server")
    parser.add_argument("--folder", type=Path, default=Path(".cache/fuzz"))
    return parser


def _fails(name: str, setting: Setting, args: argparse.Namespace) -> bool:
    """Run one setting. Prints what it gave, and tells whether anything failed."""
    begin = time.monotonic()
    with _live(setting, args) as running:
        failed = False
        try:
            failed = asyncio.run(_ask(name, setting, args, running))
        except* Lost as errors:
            failed = True
            print(f"{name}:", *_leaves(errors), running[0].log_tail(), sep="\n")
        trouble = rest.log_trouble(running[0].log_path)
    if trouble:
        print(f"{name}: in the server's log:", *trouble[:20], sep="\n  ")
    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    return failed or bool(trouble)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for each in error.exceptions:
        yield from _leaves(each)


@contextmanager
def _live(setting: Setting, args: argparse.Namespace) -> Iterator[list[ServerProcess]]:
    """The server under test, and for mixes its references."""
    count = 1 if args.soak else None
    if args.device == "cpu":
        commands = (f"{setting.flags} {args.flags}", servers.REFERENCE)
        door = args.door or setting.door
        made = setting.kind, commands[:count], args.folder, door
        with servers.live(*made) as running:
            yield running
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        specs = cuda.specs(setting, args.flags, forced=not args.soak)
        with cuda.live(specs[:count], Path(folder)) as running:
            yield running


async def _ask(
    name: str, setting: Setting, args: argparse.Namespace, running: list[ServerProcess]
) -> bool:
    if args.soak:
        group = servers.process_id(running[0])
        async with Client(running[0].base_url) as client:
            longest = setting.longest_prompt
            found = await soak(client, group, setting.ranks, longest, args.soak)
        print(f"{name}: {args.soak:g} minutes of soak: {found}", flush=True)
        return False
    if args.device == "cpu":
        return await _ask_cpu(name, setting, args, running)
    return await _ask_cuda(name, setting, args, running)


def _mixes(setting: Setting, args: argparse.Namespace) -> list[Mix]:
    if args.mix:
        return [Mix.from_json(args.mix.read_text())]
    # A forced token need not be one that a grammar allows.
    grammar = args.device == "cpu" and not args.no_grammar
    seeds = range(args.seed, args.seed + args.mixes)
    return [make_mix(seed, setting.limits(grammar)) for seed in seeds]


async def _ask_cpu(
    name: str, setting: Setting, args: argparse.Namespace, running: list[ServerProcess]
) -> bool:
    def tell(mix: Mix, faults: list[str]) -> None:
        print(f"{name}: seed {mix.seed}:", *faults, sep="\n  ", flush=True)

    urls = [server.base_url for server in running]
    async with Client(urls[0]) as tested, Client(urls[1]) as reference:
        mixes = _mixes(setting, args)
        result = await drive(tested, reference, setting, mixes, tell, args.together)
        print(f"{name}: {result.mixes} mixes, {result.counts}", flush=True)
        if result.failed and not args.no_shrink:
            mix = result.failed[0][0]
            least = await minimize(tested, reference, setting, mix)
            print(f"{name}: the least mix of seed {mix.seed}:\n{least.to_json()}")
    return bool(result.failed)


async def _ask_cuda(
    name: str, setting: Setting, args: argparse.Namespace, running: list[ServerProcess]
) -> bool:
    urls = [server.base_url for server in running]
    async with (
        Client(urls[0]) as tested,
        Client(urls[1]) as tp1,
        Client(urls[2]) as tp2,
    ):
        result = await cuda.drive(tested, tp1, tp2, setting, _mixes(setting, args))
    print(f"{name}: {result.mixes} mixes, {result.counts}")
    print(
        f"{name}: |d logprob| {result.found}; plain tp 2: {result.spread}", flush=True
    )
    for mix, faults in result.failed:
        print(f"{name}: seed {mix.seed}:", *faults, mix.to_json(), sep="\n  ")
    return bool(result.failed) or not result.found.within(result.spread)


if __name__ == "__main__":
    sys.exit(main())
