"""Decode time per token with speculation, without and with DCP, on live servers.

    python benchmark/bench_speculation.py results.csv --model DeepSeek-V2-Lite+MTP \
        --layouts 2:symm_a2a:q --drafts 1:2 3:3

Servers have dummy weights: plain tensor parallelism and each of `--layouts` (as in
`bench_decode.py`), without speculation and with each of `--drafts`. With `3:2` a draft has 3
steps, and each verification gives 2 tokens: a draft's first one and the target's own.
`speculation_drafts.py` says who drafts. One server is up at a time, or as many as `--at-once`
says, and each is measured while the others idle.

- **Accepted tokens.** Weights are dummies, so hardly any draft would be right. SGLang
  simulates the accepted length instead (`SGLANG_SIMULATE_ACC_LEN`, read at start). It is a
  whole number, since each rank would draw a fraction for itself. A server does all its work:
  drafting, verification, the draft's pass over what was verified. A reply that needed
  another number of verifications is an error, and the server is measured no further.
- **Contexts.** All requests of a batch share one prefix in the radix tree, and each adds
  a few tokens. So they read the same pages: the pool holds the context once, attention asks
  for it `batch` times, and the GPU's L2 cache may serve a part of that. With
  `--own-prefixes` each request has pages of its own, and a prefill. A context begins with
  the next smaller one, which is in the cache, so that only the rest is prefilled.
- **Times.** Replies are streamed. What counts is the time in which all requests of a batch
  decode, without the first tokens. A step is one decode step, or a draft and its
  verification. Its time is the mean in that time, of which the table has the median over
  requests and repeats. The 95th percentile is over the gaps between pieces of replies, so it
  has the client in it. A first repeat warms up and is not counted.

Greedy replies of fixed length. Not measured: real weights, how many drafts are right,
batches whose requests accept different numbers.

DCP refuses drafts on CPUs. `--tests-plugin` allows them to the servers of this run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from decode_quantization import config_entries
from live_client import Client, Ids, cache_misses
from live_servers import log_beside, new_server, record_servers, say, who
from sglang_dcp.demo.server import ServerProcess
from speculation_door import open_door
from speculation_drafts import (
    ALGORITHMS,
    Served,
    Speculation,
    default_draft,
    environment_of,
    flags_of,
    impossible_draft,
    write_draft,
)
from speculation_replies import (
    WARM_TOKENS,
    Reply,
    check,
    output_tokens,
    request_body,
    stream,
)
from speculation_report import FIELDS, Row, read, summary, tables
from speculation_sizes import (
    OWN_TOKENS,
    Size,
    prefixes_of,
    rank_pool,
    slots_of,
    tokens_of,
)

Repeats = list[list[Reply]]


class Prepared(NamedTuple):
    """What all servers of a run share: checkpoints without weights, and the environment."""

    target: Path
    draft: Path
    env: Mapping[str, str]


def decode(
    options: argparse.Namespace,
    client: Client,
    prefixes: Sequence[Ids],
    size: Size,
    speculation: Speculation,
) -> Repeats:
    """Return the replies of the counted repeats; `prefixes` are in the cache."""
    tokens = output_tokens(options.output_len, speculation.accepted)
    repeats = []
    for _ in range(1 + options.repeats):
        bodies = [
            request_body(
                [*prefixes[place % len(prefixes)], *client.ids(OWN_TOKENS)], tokens
            )
            for place in range(size.batch)
        ]
        with ThreadPoolExecutor(size.batch) as pool:
            replies = list(pool.map(lambda body: stream(client.url, body), bodies))
        check(replies, speculation, tokens)
        repeats.append(replies)
    return repeats[1:]


def ask(
    options: argparse.Namespace, served: Served, url: str
) -> Iterator[tuple[Size, Repeats]]:
    """Yield what a server gave for each size, nothing for one that does not fit."""
    client = Client(url, vocab_size(options.model))
    room = client.pool_tokens()
    count = prefixes_of(options, max(options.batches))
    longest = [client.ids(max(options.contexts)) for _ in range(count)]
    for context in sorted(options.contexts):
        sizes = [Size(context, batch) for batch in options.batches]
        fitting = [size for size in sizes if slots_of(options, size) <= room]
        most = max((prefixes_of(options, size.batch) for size in fitting), default=0)
        prefixes = [whole[:context] for whole in longest[:most]]
        began = time.monotonic()
        for prefix in prefixes:
            client.together([prefix])
        took = time.monotonic() - began
        say(f"{served.name}: {most} x {context} prefilled in {took:.1f} s")
        for size in sizes:
            found: Repeats = []
            if size in fitting:
                found = decode(options, client, prefixes, size, served.speculation)
            yield size, found


def rows_of(options: argparse.Namespace, served: Served, url: str) -> Iterator[Row]:
    """Yield a row for each size, from what one server gave."""
    layout, speculation = served
    draft = options.draft if speculation.steps else "-"
    for size, repeats in ask(options, served, url):
        what = (*size, prefixes_of(options, size.batch))
        how = (draft, *speculation)
        row = summary(who(options, layout), how, what, repeats, options.weights)
        did = f"{row.step_ms:.2f} ms a step" if repeats else "does not fit"
        say(f"{served.name}: {size.batch} x {size.context}: {did}")
        yield row


def make_server(
    options: argparse.Namespace, served: Served, prepared: Prepared
) -> ServerProcess:
    layout, speculation = served
    pool = {"max_total_tokens": rank_pool(options, layout.dcp_size)}
    flags = ["--skip-tokenizer-init", "--chunked-prefill-size", str(options.chunk)]
    flags += flags_of(speculation, options.draft, prepared.draft)
    return new_server(
        argparse.Namespace(**{**vars(options), **pool}),
        layout,
        prepared.target,
        log_beside(options.csv, served.name),
        flags,
        {
            **prepared.env,
            **environment_of(speculation, options.draft),
        },
    )


def record(options: argparse.Namespace, prepared: Prepared) -> list[str]:
    """Measure every server, rows into the CSV as they come; a line for each that failed."""
    return record_servers(
        options.csv,
        FIELDS,
        servers(options),
        options.ready_s,
        lambda served: make_server(options, served, prepared),
        lambda served, url: rows_of(options, served, url),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add(
        "--contexts",
        type=int,
        nargs="+",
        default=[65536, 262144],
        help="tokens of the cached prefix",
    )
    add("--batches", type=int, nargs="+", default=[1, 8], help="requests at once")
    add(
        "--drafts",
        type=Speculation.parse,
        nargs="*",
        metavar="STEPS:ACCEPTED",
        default=[Speculation(1, 2), Speculation(3, 3)],
        help="steps of the draft, and tokens of each verification",
    )
    add("--draft", choices=ALGORITHMS, help="who drafts; default: the model's own")
    add("--without-off", action="store_true", help="no server without speculation")
    add("--without-plain", action="store_true", help="no server without DCP")
    add(
        "--own-prefixes",
        action="store_true",
        help="each request has one, on pages of its own",
    )
    add("--output-len", type=int, default=128, help="least tokens of a reply")
    add("--repeats", type=int, default=3, help="counted ones; one more warms up")
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size")
    add("--at-once", type=int, default=1, help="servers up at the same time")
    add("--ready-s", type=float, default=240.0, help="seconds for these to start")
    add(
        "--tests-plugin",
        action="store_true",
        help="let CPU servers with DCP speculate, by the plugin of the live tests",
    )
    options = parser.parse_args(argv)
    for name in ("repeats", "at_once"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more")
    if options.output_len < 2 * WARM_TOKENS:
        parser.error(f"--output-len: {2 * WARM_TOKENS} or more")
    options.csv = options.csv.absolute()
    # What `server_flags` takes for the most requests at once.
    options.concurrency = options.batches
    fill_engine_defaults(parser, options, defaults=1)
    options.draft = options.draft or default_draft(options.model)
    reason = impossible_draft(options.draft, options.model)
    if reason:
        parser.error(reason)
    return options


def servers(options: argparse.Namespace) -> list[list[Served]]:
    """Return groups of servers that are up together; layouts with one draft come together."""
    layouts = [options.plain] * (not options.without_plain) + options.layouts
    speculations = [Speculation()] * (not options.without_off) + options.drafts
    every = [Served(layout, one) for one in speculations for layout in layouts]
    return [
        every[first : first + options.at_once]
        for first in range(0, len(every), options.at_once)
    ]


def prepare(options: argparse.Namespace, root: Path) -> Prepared:
    """Write the models, and the tests' plugin if asked for, into `root`."""
    longest = max(options.contexts) + tokens_of(options, 1) + OWN_TOKENS
    target = root / options.model.replace("/", "-")
    target.mkdir()
    write_model(target, options.model, longest, config_entries(options.quantization))
    env = open_door(root / "door", options.device) if options.tests_plugin else {}
    draft = write_draft(options.draft, options.model, target, longest)
    return Prepared(target, draft, env)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        errors = record(options, prepare(options, Path(folder)))
    rows = read(options.csv)
    errors += cache_misses(
        [(row.layout, row.cached, row.context) for row in rows if row.step_ms],
        options.page_size * options.tp,
    )
    print(
        f"\n{options.model}, {options.weights} weights, tp {options.tp}, draft {options.draft}\n"
    )
    print(tables(rows))
    print("\n" + ("\n".join(errors) or "every request was answered"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
