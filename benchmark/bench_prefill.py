"""Seconds to the first token, without and with DCP: whole prompts, and turns on a prefix.

    python benchmark/bench_prefill.py results.csv --tp 2 --layouts 2:symm_a2a:q

One server after the other: plain tensor parallelism, then each of `--layouts` (as in
`bench_decode.py`), with dummy weights and token ids, so that neither a tokenizer nor a
network is needed. `--start-together` starts all at once, and one is measured while the
others idle. For each of `--prefixes` a server gets

- one whole prompt of that length at a time, with nothing cached;
- for each of `--turns` and `--batches`: that many requests at once, each with that many new
  tokens on a cached prefix of its own (a turn, as of a conversation).

A request asks for one token, so its time is the one to the first token, as a client on the
same machine sees it. A first repeat warms up and is not counted. Whole prompts have it for
the first length only. Prefixes are prefilled once for all `--turns` of a batch. A size that
the KV pool cannot hold is a line without a time. A prefix that was not found in the cache
makes the exit status 1. With `--peak-memory` each rank also notes what its largest forward took
beside what was allocated before it. Not measured: real weights, tokenization, other requests
that decode.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from decode_layouts import Layout
from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from decode_quantization import config_entries
from decode_report import markdown
from doors import OPENED, add_doors, open_layouts, opened_env
from live_client import Answers, Client, Ids, cache_misses
from live_servers import (
    add_server_options,
    groups_of,
    log_beside,
    new_server,
    record_servers,
    say,
    who,
)
from memory_door import open_door, take_peaks
from prefill_report import FIELDS, Row, memory_table, ratio_table, read, summary
from sglang_dcp.demo.server import ServerProcess

# SGLang keeps the last tokens of a full pool for itself.
SPARE_TOKENS = 8
# Most requests of a decode step, as SGLang has on its own: it captures steps of so many rows,
# and a short prefill may be one.
MOST_RUNNING = 256


class Size(NamedTuple):
    """What is sent at once: `batch` requests of `new` tokens on `prefix` cached ones."""

    prefix: int
    new: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * (self.prefix + self.new + 1)


def groups(options: argparse.Namespace) -> Iterator[list[Size]]:
    """Yield sizes that share what is cached: the whole prompt, then turns on it."""
    for prefix in options.prefixes:
        whole = [Size(0, prefix, 1)] if options.whole_repeats else []
        for batch in sorted({1, *options.batches}):
            wanted = options.turns if batch in options.batches else []
            turns = [Size(prefix, new, batch) for new in wanted]
            if group := [*whole, *turns]:
                yield group
            whole = []


def cache_prefixes(client: Client, size: Size) -> list[Ids]:
    """Return new prefixes, one a request, that are all the cache holds."""
    client.flush()
    prefixes = [client.ids(size.prefix) for _ in range(size.batch)]
    for prefix in prefixes:
        client.together([prefix])
    return prefixes


def measure_turns(
    client: Client, size: Size, prefixes: list[Ids], repeats: int
) -> Answers:
    """Return the answers of the counted repeats of turns on cached `prefixes`."""
    answers: Answers = []
    for repeat in range(1 + repeats):
        found = client.together([prefix + client.ids(size.new) for prefix in prefixes])
        answers += found if repeat else []
    return answers


def measure_whole(
    client: Client, size: Size, options: argparse.Namespace
) -> tuple[list[Ids], Answers]:
    """Return the last whole prompt, which the cache holds now, and the counted answers."""
    # Longer prompts find the kernels warm.
    warm_ups = int(size.new == options.prefixes[0])
    answers: Answers = []
    for _ in range(warm_ups + options.whole_repeats):
        client.flush()
        prompts = [client.ids(size.new)]
        answers += client.together(prompts)
    return prompts, answers[warm_ups:]


def measure_group(
    client: Client, group: Sequence[Size], options: argparse.Namespace, room: int
) -> Iterator[tuple[Size, Answers]]:
    """Yield what came for each size of `groups`, nothing for one that exceeds `room`.

    A prefix is prefilled once for all turns; those of one request are on the last whole
    prompt. What turns leave in the cache is older than the prefixes, which every turn uses,
    so a full pool drops it first.
    """
    prefixes: list[Ids] = []
    for size in group:
        if size.tokens > room:
            yield size, []
        elif not size.prefix:
            prefixes, answers = measure_whole(client, size, options)
            yield size, answers
        else:
            prefixes = prefixes or cache_prefixes(client, size)
            yield size, measure_turns(client, size, prefixes, options.repeats)


def make_server(
    options: argparse.Namespace, layout: Layout, model: Path
) -> ServerProcess:
    flags = ["--skip-tokenizer-init", "--chunked-prefill-size", str(options.chunk)]
    log = log_beside(options.csv, layout.name)
    env = opened_env(options.folder, layout, options.doors)
    if options.peak_memory:
        env = open_door(peaks_of(options, layout))
    return new_server(options, layout, model, log, flags, env)


def peaks_of(options: argparse.Namespace, layout: Layout) -> Path:
    """Return where the ranks of a server leave their peaks."""
    folder: Path = options.folder / f"peaks-{layout.name}".replace(":", "-")
    return folder


def rows_of(options: argparse.Namespace, layout: Layout, url: str) -> Iterator[Row]:
    """Yield what one server gave for each size."""
    client = Client(url, vocab_size(options.model))
    room = client.pool_tokens() - SPARE_TOKENS
    told = client.told_bytes() if options.peak_memory else 0
    peaks = peaks_of(options, layout)
    for group in groups(options):
        for size, answers in measure_group(client, group, options, room):
            say(f"{layout.name}: {size.batch} x {size.prefix} + {size.new}")
            seconds = [answer.seconds for answer in answers]
            cached = min((answer.cached for answer in answers), default=0)
            row = summary(who(options, layout), size, seconds, cached, options.weights)
            taken = " ".join(map(str, take_peaks(peaks)))
            yield row._replace(peak_bytes=taken, told_bytes=told)


def record(options: argparse.Namespace, model: Path) -> list[str]:
    """Measure every server, rows into the CSV as they come; a line for each that failed."""
    return record_servers(
        options.csv,
        FIELDS,
        groups_of(options, (options.plain, *options.layouts)),
        options.ready_s,
        lambda layout: make_server(options, layout, model),
        lambda layout, url: rows_of(options, layout, url),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add_server_options(parser)
    add(
        "--prefixes",
        type=int,
        nargs="+",
        default=[32768, 131072, 262144],
        help="tokens of whole prompts, and of the cached prefixes of turns",
    )
    add("--turns", type=int, nargs="*", default=[1, 64], help="new tokens on a prefix")
    add("--batches", type=int, nargs="+", default=[1, 16], help="turns at once")
    add("--repeats", type=int, default=3, help="counted ones; one more warms up")
    add(
        "--whole-repeats",
        type=int,
        help="counted whole prompts, 0 for none; default: as --repeats",
    )
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size")
    add(
        "--peak-memory",
        action="store_true",
        help="note what the largest forward takes on each GPU; not with upstream layouts",
    )
    add_doors(parser)
    options = parser.parse_args(argv)
    if options.doors and options.peak_memory:
        parser.error("--doors: not with --peak-memory")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: 1 or more")
    if options.whole_repeats is None:
        options.whole_repeats = options.repeats
    if options.whole_repeats < 0:
        parser.error(f"--whole-repeats {options.whole_repeats}: 0 or more")
    if options.peak_memory and options.device == "cpu":
        parser.error("--peak-memory: torch counts the memory of GPUs alone")
    upstream = [layout for layout in options.layouts or () if layout.is_upstream]
    if options.peak_memory and upstream:
        parser.error("--peak-memory: upstream layouts load no plugin")
    options.csv = options.csv.absolute()
    # What `server_flags` takes for the most requests at once.
    options.concurrency = [*options.batches, MOST_RUNNING]
    fill_engine_defaults(parser, options, defaults=1)
    open_layouts(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        longest = max(options.prefixes) + max([0, *options.turns]) + 16
        more = config_entries(options.quantization)
        errors = record(
            options, write_model(Path(folder), options.model, longest, more)
        )
    rows = read(options.csv)
    errors += cache_misses(
        [(row.layout, row.cached, row.prefix) for row in rows if row.median_s],
        options.page_size * options.tp,
    )
    print(
        f"\n{options.model}, {options.weights} weights, tp {options.tp}, "
        "seconds to the first token\n"
    )
    if options.doors:
        print(f"{OPENED} opens {', '.join(options.doors)}\n")
    print(markdown(ratio_table(rows)))
    if options.peak_memory:
        print("\n" + markdown(memory_table(rows)))
    print("\n" + ("\n".join(errors) or "every request was answered"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
