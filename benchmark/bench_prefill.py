"""Seconds to the first token, without and with DCP: whole prompts, and turns on a prefix.

    python benchmark/bench_prefill.py results.csv --tp 2 --layouts 2:symm_a2a:q

One server after the other: plain tensor parallelism, then each of `--layouts` (as in
`bench_decode.py`), with dummy weights and token ids, so that neither a tokenizer nor a
network is needed. For each of `--prefixes` a server gets

- one whole prompt of that length at a time, with nothing cached;
- for each of `--turns` and `--batches`: that many requests at once, each with that many new
  tokens on a cached prefix of its own.

A request asks for one token, so its time is the one to the first token, as a client on the
same machine sees it. The first repeat warms up and is not counted. A size that the KV
pool cannot hold is a line without a time. A prefix that was not found in the cache makes
the exit status 1. Not measured: real weights, tokenization, other requests that decode.
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

from bench_serving import say, server_flags
from decode_layouts import Layout
from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from decode_report import markdown
from prefill_report import FIELDS, Row, ratio_table, read, summary
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerFailed, ServerProcess

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


def sizes(options: argparse.Namespace) -> Iterator[list[Size]]:
    """Yield the sizes of each prefix: the whole prompt first, then turns on it."""
    for prefix in options.prefixes:
        turns = [
            Size(prefix, new, batch)
            for batch in options.batches
            for new in options.turns
        ]
        yield [Size(0, prefix, 1), *turns]


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

    def together(self, prompts: Sequence[Ids]) -> list[Answer]:
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


def measure(asked: Asked, size: Size, repeats: int) -> list[Answer]:
    """Return the answers of the counted repeats; `size` fits the pool."""
    asked.flush()
    prefixes = [asked.ids(size.prefix) for _ in range(size.batch)]
    if size.prefix:
        for prefix in prefixes:
            asked.together([prefix])
    answers: list[Answer] = []
    for repeat in range(1 + repeats):
        if not size.prefix:
            asked.flush()
        found = asked.together([prefix + asked.ids(size.new) for prefix in prefixes])
        answers += found if repeat else []
    return answers


def serve(
    options: argparse.Namespace, layout: Layout, model: Path
) -> Iterator[tuple[Size, list[Answer]]]:
    """Yield what one server gave for each size, nothing for one that does not fit."""
    log = options.csv.with_name(f"{options.csv.stem}-{layout.name}.log")
    flags = [*server_flags(options, layout), "--skip-tokenizer-init"]
    flags += ["--chunked-prefill-size", str(options.chunk)]
    env = {"SGLANG_PLUGINS": options.off_plugins} if layout.is_upstream else {}
    say(f"{layout.name}: starting its server")
    with ServerProcess(
        model,
        flags,
        log_path=log.with_name(log.name.replace(":", "-")),
        env=env,
        device=options.device,
        grace=5.0,
    ) as server:
        say(f"{layout.name}: ready after {server.wait_ready(options.ready_s):.0f} s")
        asked = Asked(server.base_url, vocab_size(options.model))
        room = asked.pool_tokens() - SPARE_TOKENS
        for of_prefix in sizes(options):
            for size in of_prefix:
                fits = size.tokens <= room
                yield size, measure(asked, size, options.repeats) if fits else []
        if server.returncode is not None:
            raise ServerFailed(f"the server ended:\n{server.log_tail()}")


def rows_of(options: argparse.Namespace, layout: Layout, model: Path) -> Iterator[Row]:
    on_gpu = options.device == "cuda"
    gpu = torch.cuda.get_device_name() if on_gpu else platform.machine()
    for size, answers in serve(options, layout, model):
        say(f"{layout.name}: {size.batch} x {size.prefix} + {size.new}")
        yield summary(
            (options.model, options.tp, gpu, layout.name, layout.attention),
            size,
            [answer.seconds for answer in answers],
            min((answer.cached for answer in answers), default=0),
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add("--prefixes", type=int, nargs="+", default=[32768, 131072, 262144])
    add("--turns", type=int, nargs="*", default=[1, 64], help="new tokens on a prefix")
    add("--batches", type=int, nargs="+", default=[1, 16], help="turns at once")
    add("--repeats", type=int, default=3)
    add("--chunk", type=int, default=8192, help="--chunked-prefill-size")
    add("--ready-s", type=float, default=200.0, help="for a server to start")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: 1 or more")
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
    errors: list[str] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        options.csv.open("w", newline="") as lines,
    ):
        longest = max(options.prefixes) + max([0, *options.turns]) + 16
        model = write_model(Path(folder), options.model, longest)
        table = csv.writer(lines)
        table.writerow(FIELDS)
        for layout in (options.plain, *options.layouts):
            try:
                for row in rows_of(options, layout, model):
                    table.writerow(row)
                    lines.flush()
            except (ServerFailed, RuntimeError, OSError) as error:
                # The other servers are worth their time all the same.
                errors.append(f"{layout.name}: {error}")
                say(errors[-1])
    rows = read(options.csv)
    errors += [
        f"{row.layout}: {row.cached} of {row.prefix} tokens came from the cache"
        for row in rows
        if row.median_s and row.cached < row.prefix - options.page_size * options.tp
    ]
    print(f"\n{options.model}, tp {options.tp}, seconds to the first token\n")
    print(markdown(ratio_table(rows)))
    print("\n" + ("\n".join(errors) or "every request was answered"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
