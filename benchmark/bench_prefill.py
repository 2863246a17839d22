"""Seconds to the first token, without and with DCP: whole prompts, and turns on a prefix.

    python benchmark/bench_prefill.py results.csv --tp 2 --layouts 2:symm_a2a:q

One server after the other: plain tensor parallelism, then each of `--layouts` (as in
`bench_decode.py`), with dummy weights and token ids, so that neither a tokenizer nor a
network is needed. `--start-together` starts all at once, and one is measured while the
others idle. For each of `--prefixes` a server gets

- one whole prompt of that length at a time, with nothing cached;
- for each of `--turns` and `--batches`: that many requests at once, each with that many new
  tokens on a cached prefix of its own.

A request asks for one token, so its time is the one to the first token, as a client on the
same machine sees it. The first repeat warms up and is not counted; of whole prompts, that of
the first length alone. Prefixes are prefilled once for all `--turns` of a batch. A size that
the KV pool cannot hold is a line without a time. A prefix that was not found in the cache
makes the exit status 1. Not measured: real weights, tokenization, other requests that decode.
"""

from __future__ import annotations

import argparse
import csv
import http
import platform
import random
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from decode_layouts import Layout
from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from decode_quantization import PLAIN, config_entries
from decode_report import markdown
from live_servers import add_server_options, measure_servers, new_server, say
from prefill_report import FIELDS, Row, ratio_table, read, summary
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess

Ids = list[int]
# SGLang keeps the last tokens of a full pool for itself.
SPARE_TOKENS = 8
FLUSH_TRIES = 50


class Size(NamedTuple):
    """What is sent at once: `batch` requests of `new` tokens on `prefix` cached ones."""

    prefix: int
    new: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.batch * (self.prefix + self.new + 1)


class Answer(NamedTuple):
    """Seconds of one request, and how many of its tokens came from the cache."""

    seconds: float
    cached: int


Answers = list[Answer]


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


class Asked:
    """Sends requests to one server.

    Parameters
    ----------
    url : str
    vocabulary : int
        Ids are drawn below it. The same run draws the same ids.
    """

    def __init__(self, url: str, vocabulary: int) -> None:
        self._url = url
        self._draw = random.Random(0)
        self._vocabulary = vocabulary

    def ids(self, count: int) -> Ids:
        return self._draw.choices(range(2, self._vocabulary), k=count)

    def pool_tokens(self) -> int:
        return int(http_json(f"{self._url}/server_info")["max_total_num_tokens"])

    def flush(self) -> None:
        """Empty the radix cache. It waits until the last request is put away."""
        # The server is on this machine, so a proxy of the environment must not be used.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(FLUSH_TRIES):
            try:
                opener.open(f"{self._url}/flush_cache", data=b"").close()
                return
            except urllib.error.HTTPError as error:
                if error.code != http.HTTPStatus.BAD_REQUEST:
                    raise
                time.sleep(0.1)
        raise RuntimeError("the cache could not be flushed")

    def together(self, prompts: Sequence[Ids]) -> Answers:
        """Send all at once, and wait for all."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._one, prompts))

    def _one(self, ids: Ids) -> Answer:
        payload = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }
        began = time.perf_counter()
        found = http_json(f"{self._url}/generate", payload)
        seconds = time.perf_counter() - began
        return Answer(seconds, int(found["meta_info"]["cached_tokens"]))


def cache_prefixes(asked: Asked, size: Size) -> list[Ids]:
    """Return new prefixes, one a request, that are all the cache holds."""
    asked.flush()
    prefixes = [asked.ids(size.prefix) for _ in range(size.batch)]
    for prefix in prefixes:
        asked.together([prefix])
    return prefixes


def measure_turns(
    asked: Asked, size: Size, prefixes: list[Ids], repeats: int
) -> Answers:
    """Return the answers of the counted repeats of turns on cached `prefixes`."""
    answers: Answers = []
    for repeat in range(1 + repeats):
        found = asked.together([prefix + asked.ids(size.new) for prefix in prefixes])
        answers += found if repeat else []
    return answers


def measure_whole(
    asked: Asked, size: Size, options: argparse.Namespace
) -> tuple[list[Ids], Answers]:
    """Return the last whole prompt, which the cache holds now, and the counted answers."""
    # Longer prompts find the kernels warm.
    warm_ups = int(size.new == options.prefixes[0])
    answers: Answers = []
    for _ in range(warm_ups + options.whole_repeats):
        asked.flush()
        prompts = [asked.ids(size.new)]
        answers += asked.together(prompts)
    return prompts, answers[warm_ups:]


def measure_group(
    asked: Asked, group: Sequence[Size], options: argparse.Namespace, room: int
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
            prefixes, answers = measure_whole(asked, size, options)
            yield size, answers
        else:
            prefixes = prefixes or cache_prefixes(asked, size)
            yield size, measure_turns(asked, size, prefixes, options.repeats)


def make_server(
    options: argparse.Namespace, layout: Layout, model: Path
) -> ServerProcess:
    flags = ["--skip-tokenizer-init", "--chunked-prefill-size", str(options.chunk)]
    return new_server(options, layout, model, options.csv, flags, {})


def rows_of(options: argparse.Namespace, layout: Layout, url: str) -> Iterator[Row]:
    """Yield what one server gave for each size."""
    on_gpu = options.device == "cuda"
    gpu = torch.cuda.get_device_name() if on_gpu else platform.machine()
    who = (options.model, options.tp, gpu, layout.name, layout.attention)
    asked = Asked(url, vocab_size(options.model))
    room = asked.pool_tokens() - SPARE_TOKENS
    for group in groups(options):
        for size, answers in measure_group(asked, group, options, room):
            say(f"{layout.name}: {size.batch} x {size.prefix} + {size.new}")
            seconds = [answer.seconds for answer in answers]
            cached = min((answer.cached for answer in answers), default=0)
            yield summary(who, size, seconds, cached, options.quantization or PLAIN)


def record(options: argparse.Namespace, model: Path) -> list[str]:
    """Measure every server, rows into the CSV as they come; a line for each that failed."""
    with options.csv.open("w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(FIELDS)
        # A run that is ended before its first row leaves the head.
        lines.flush()

        def measure(layout: Layout, server: ServerProcess) -> None:
            for row in rows_of(options, layout, server.base_url):
                table.writerow(row)
                lines.flush()

        return measure_servers(
            options,
            (options.plain, *options.layouts),
            lambda layout: make_server(options, layout, model),
            measure,
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add_server_options(parser)
    add("--prefixes", type=int, nargs="+", default=[32768, 131072, 262144])
    add("--turns", type=int, nargs="*", default=[1, 64], help="new tokens on a prefix")
    add("--batches", type=int, nargs="+", default=[1, 16], help="turns at once")
    add("--repeats", type=int, default=3)
    add("--whole-repeats", type=int, help="of whole prompts; 0 leaves them out")
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: 1 or more")
    if options.whole_repeats is None:
        options.whole_repeats = options.repeats
    if options.whole_repeats < 0:
        parser.error(f"--whole-repeats {options.whole_repeats}: 0 or more")
    options.csv = options.csv.absolute()
    # What `server_flags` takes for the most requests at once.
    options.concurrency = options.batches
    named = options.layouts is not None
    fill_engine_defaults(parser, options)
    if not named:
        del options.layouts[1:]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        longest = max(options.prefixes) + max([0, *options.turns]) + 16
        more = config_entries(options.quantization)
        errors = record(
            options, write_model(Path(folder), options.model, longest, more)
        )
    rows = read(options.csv)
    errors += [
        f"{row.layout}: {row.cached} of {row.prefix} tokens came from the cache"
        for row in rows
        if row.median_s and row.cached < row.prefix - options.page_size * options.tp
    ]
    weights = options.quantization or PLAIN
    print(
        f"\n{options.model}, {weights} weights, tp {options.tp}, "
        "seconds to the first token\n"
    )
    print(markdown(ratio_table(rows)))
    print("\n" + ("\n".join(errors) or "every request was answered"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
