"""Decode time per token with speculation, without and with DCP, on live servers.

    python benchmark/bench_speculation.py results.csv --model DeepSeek-V2-Lite+MTP \
        --layouts 2:symm_a2a:q --drafts 1:2 3:3

Servers with dummy weights: plain tensor parallelism and each of `--layouts` (as in
`bench_decode.py`), without speculation and with each of `--drafts`. `3:2` is a draft of 3
steps of which each verification gives 2 tokens. `speculation_drafts.py` says who drafts.

- **Accepted tokens.** Weights are dummies, so hardly any draft would be right. SGLang
  simulates the accepted length instead (`SGLANG_SIMULATE_ACC_LEN`, read at start). It is a
  whole number, since each rank would draw a fraction for itself. All that a server does is
  done: drafting, verification, the draft's pass over what was verified. A reply that needed
  another number of verifications ends its server.
- **Contexts.** All requests of a batch share one prefix in the radix tree, and each adds
  a few tokens. So they read the same pages: the pool holds the context once, attention asks
  for it `batch` times, and the GPU's L2 cache may serve a part of that. With
  `--own-prefixes` each request has pages of its own, and a prefill. A context extends the
  next smaller one, so that a server prefills the longest one only.
- **Times.** Replies are streamed. What counts is the time in which all requests of a batch
  decode, without the first tokens. Time per step is the median over requests and repeats of
  the mean in that time. Its 95th percentile is over the gaps between pieces of replies, so it
  has the client in it. A warm-up comes first.

Greedy replies of fixed length. Not measured: real weights, how many drafts are right,
batches whose requests accept different numbers.

DCP refuses speculation on GPUs until its tests have passed there. README.md says how the
tests' plugin opens it for this script.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from bench_prefill import Asked
from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from live_servers import say, server_flags
from sglang_dcp.demo.server import ServerFailed, ServerProcess
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
    encoded,
    output_tokens,
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


class Folders(NamedTuple):
    """Checkpoints without weights."""

    target: Path
    draft: Path


def measure(
    options: argparse.Namespace,
    asked: Asked,
    url: str,
    prefixes: Sequence[Sequence[int]],
    size: Size,
    speculation: Speculation,
) -> list[list[Reply]]:
    """Return the replies of the counted repeats; `prefixes` are in the cache."""
    tokens = output_tokens(options.output_len, speculation.accepted)
    repeats = []
    for _ in range(1 + options.repeats):
        bodies = [
            encoded([*prefixes[place % len(prefixes)], *asked.ids(OWN_TOKENS)], tokens)
            for place in range(size.batch)
        ]
        with ThreadPoolExecutor(size.batch) as pool:
            replies = list(pool.map(lambda body: stream(url, body), bodies))
        check(replies, speculation, tokens)
        repeats.append(replies)
    return repeats[1:]


def ask(
    options: argparse.Namespace, served: Served, server: ServerProcess
) -> Iterator[tuple[Size, list[list[Reply]]]]:
    """Yield what a server gave for each size, nothing for one that does not fit."""
    asked = Asked(server.base_url, vocab_size(options.model))
    room = asked.pool_tokens()
    count = prefixes_of(options, max(options.batches))
    longest = [asked.ids(max(options.contexts)) for _ in range(count)]
    for context in sorted(options.contexts):
        sizes = [Size(context, batch) for batch in options.batches]
        fitting = [size for size in sizes if slots_of(options, size) <= room]
        most = max((prefixes_of(options, size.batch) for size in fitting), default=0)
        prefixes = [whole[:context] for whole in longest[:most]]
        began = time.monotonic()
        for prefix in prefixes:
            asked.together([prefix])
        took = time.monotonic() - began
        say(f"{served.name}: {most} x {context} prefilled in {took:.1f} s")
        for size in sizes:
            found: list[list[Reply]] = []
            if size in fitting:
                how = (size, served.speculation)
                found = measure(options, asked, server.base_url, prefixes, *how)
            yield size, found
    if server.returncode is not None:
        raise ServerFailed(f"the server ended:\n{server.log_tail()}")


def make_server(
    options: argparse.Namespace, served: Served, folders: Folders
) -> ServerProcess:
    """Not started yet; its log lies beside the results."""
    layout, speculation = served
    pool = {"max_total_tokens": rank_pool(options, layout.dcp_size)}
    flags = server_flags(argparse.Namespace(**{**vars(options), **pool}), layout)
    flags += ["--skip-tokenizer-init", "--chunked-prefill-size", str(options.chunk)]
    flags += flags_of(speculation, options.draft, folders.draft)
    env = environment_of(speculation, options.draft)
    # Servers that start beside each other load at different times on each GPU.
    env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    if layout.is_upstream:
        env["SGLANG_PLUGINS"] = options.off_plugins
    name = f"{options.csv.stem}-{served.name}.log".replace(":", "-").replace(" ", "-")
    return ServerProcess(
        folders.target,
        flags,
        log_path=options.csv.with_name(name),
        env=env,
        device=options.device,
        grace=5.0,
    )


def serve(
    options: argparse.Namespace,
    group: Sequence[Served],
    folders: Folders,
    errors: list[str],
) -> Iterator[Row]:
    """Yield rows of servers that are up at the same time, each loaded alone.

    A server that fails leaves a line in `errors`. The others go on.
    """

    def failed(served: Served, error: Exception) -> None:
        errors.append(f"{served.name}: {error}")
        say(errors[-1])

    with ExitStack() as stack:
        began = time.monotonic()
        starting = []
        for served in group:
            say(f"{served.name}: starting its server")
            server = make_server(options, served, folders)
            starting.append((served, stack.enter_context(server)))
        ready = []
        for served, server in starting:
            try:
                server.wait_ready(max(1.0, began + options.ready_s - time.monotonic()))
                ready.append((served, server))
                say(f"{served.name}: ready after {time.monotonic() - began:.0f} s")
            except ServerFailed as error:
                failed(served, error)
                # It would still load and capture while others are measured.
                server.stop()
        for served, server in ready:
            try:
                for size, repeats in ask(options, served, server):
                    yield row_of(options, served, size, repeats)
            except (ServerFailed, RuntimeError, OSError) as error:
                failed(served, error)


def row_of(
    options: argparse.Namespace,
    served: Served,
    size: Size,
    repeats: Sequence[Sequence[Reply]],
) -> Row:
    layout, speculation = served
    on_gpu = options.device == "cuda"
    gpu = torch.cuda.get_device_name() if on_gpu else platform.machine()
    who = (options.model, options.tp, gpu, layout.name, layout.attention)
    draft = options.draft if speculation.steps else "-"
    prefixes = prefixes_of(options, size.batch)
    row = summary(who, (draft, *speculation), (*size, prefixes), repeats)
    say(f"{served.name}: {size.batch} x {size.context}: {row.step_ms:.2f} ms a step")
    return row


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add("--contexts", type=int, nargs="+", default=[65536, 262144])
    add("--batches", type=int, nargs="+", default=[1, 8])
    add(
        "--drafts",
        type=Speculation.parse,
        nargs="*",
        metavar="STEPS:ACCEPTED",
        default=[Speculation(1, 2), Speculation(3, 3)],
        help="steps of the draft, and tokens of each verification",
    )
    add("--draft", choices=ALGORITHMS, help="who drafts; default: the model's own")
    add("--without-off", action="store_true", help="speculating servers alone")
    add("--without-plain", action="store_true", help="servers with DCP alone")
    add("--own-prefixes", action="store_true", help="requests share no pages")
    add("--output-len", type=int, default=128, help="tokens of a reply, or some more")
    add("--repeats", type=int, default=3)
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size")
    add("--at-once", type=int, default=1, help="servers up at the same time")
    add("--ready-s", type=float, default=240.0, help="for a group of servers to start")
    options = parser.parse_args(argv)
    for name in ("repeats", "at_once"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: 1 or more")
    if options.output_len < 2 * WARM_TOKENS:
        parser.error(f"--output-len: {2 * WARM_TOKENS} or more")
    options.csv = options.csv.absolute()
    # What `server_flags` takes for the most requests at once.
    options.concurrency = options.batches
    named = options.layouts is not None
    fill_engine_defaults(parser, options)
    if not named:
        del options.layouts[1:]
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


def write_models(options: argparse.Namespace, root: Path) -> Folders:
    longest = max(options.contexts) + tokens_of(options, 1) + OWN_TOKENS
    target = root / options.model.replace("/", "-")
    target.mkdir()
    write_model(target, options.model, longest)
    return Folders(target, write_draft(options.draft, options.model, target, longest))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        options.csv.open("w", newline="") as lines,
    ):
        folders = write_models(options, Path(folder))
        table = csv.writer(lines)
        table.writerow(FIELDS)
        for group in servers(options):
            for row in serve(options, group, folders, errors):
                table.writerow(row)
                lines.flush()
    rows = read(options.csv)
    errors += [
        f"{row.layout}: {row.cached} of {row.context} tokens came from the cache"
        for row in rows
        if row.step_ms and row.cached < row.context - options.page_size * options.tp
    ]
    print(f"\n{options.model}, tp {options.tp}, draft {options.draft}\n")
    print(tables(rows))
    print("\n" + ("\n".join(errors) or "every request was answered"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
