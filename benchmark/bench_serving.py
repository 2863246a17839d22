"""`python -m sglang.bench_serving` against live servers, without and with DCP.

    python benchmark/bench_serving.py results.jsonl

One server after the other: plain tensor parallelism (unless `--without-plain`), then each
of `--layouts` (as in `bench_decode.py`), with dummy weights and a tokenizer made here, so
that no network is needed. SGLang's own load generator runs against each, once for every
concurrency and input length. Each run adds a line of JSON to the results. A failed request,
or fewer output tokens than asked for, makes the exit status 1.

`--start-together` starts all servers at once, which saves most of their starting time. Only
one of them has requests at a time. `--max-total-tokens` must leave room for all pools.

`--profile STEPS` also shows where the GPU time of the first STEPS steps of each run goes.
Tracing slows a run down, so do not report its other numbers.

Prompts differ in every token and every request generates exactly its length. Not
measured: real weights, sampling, prefix hits, arrivals other than at fixed concurrency.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from decode_layouts import Layout
from decode_models import vocab_size, write_model
from decode_options import add_engine_options, fill_engine_defaults
from decode_profile import Profile
from decode_quantization import config_entries
from decode_report import markdown
from live_servers import (
    add_server_options,
    groups_of,
    log_beside,
    measure_servers,
    new_server,
    say,
)
from serving_profile import generator_flags, read_profile, tables
from sglang_dcp.demo.server import ServerProcess

SERVER_LOG_LINES = 15
# Folder beside the model's.
TOKENIZER = "tokenizer"
Result = dict[str, Any]


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of one word an id, so that any ids survive text and back."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "w0",
        "eos_token": "w1",
        "unk_token": "w0",
        "pad_token": "w0",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def load(
    options: argparse.Namespace,
    url: str,
    model: Path,
    log: Path,
    traces: Path,
    size: Sequence[int],
) -> Result:
    """Run SGLang's load generator once and return its line; traces only if asked for.

    Raises
    ------
    RuntimeError
        If it ended with an error or left no line.
    """
    concurrency, tokens = size
    line = log.with_suffix(".jsonl")
    line.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"]
    command += ["--base-url", url, "--model", str(model)]
    command += ["--tokenizer", str(model.with_name(TOKENIZER))]
    command += ["--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-range-ratio", "1", "--random-input-len", str(tokens)]
    command += ["--random-output-len", str(options.output_len)]
    command += ["--num-prompts", str(concurrency * options.rounds)]
    command += ["--max-concurrency", str(concurrency), "--flush-cache"]
    command += ["--output-file", str(line), "--disable-tqdm"]
    if options.profile:
        if traces.exists():
            # An older run's would pass for this one's.
            shutil.rmtree(traces)
        command += generator_flags(
            traces, options.profile, options.device, host=options.profile_host
        )
    with log.open("a") as output:
        done = subprocess.run(
            command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode or not line.exists():
        tail = "\n".join(log.read_text().splitlines()[-SERVER_LOG_LINES:])
        raise RuntimeError(f"bench_serving ended with {done.returncode}:\n{tail}")
    return dict(json.loads(line.read_text().splitlines()[-1]))


def make_server(
    options: argparse.Namespace, layout: Layout, model: Path
) -> ServerProcess:
    tokenizer = ["--tokenizer-path", str(model.with_name(TOKENIZER))]
    # By default SGLang traces every Python function, which is most of the time then.
    env = {"SGLANG_PROFILE_WITH_STACK": "false"}
    log = log_beside(options.jsonl, layout.name)
    return new_server(options, layout, model, log, tokenizer, env)


def serve(
    options: argparse.Namespace,
    layouts: Sequence[Layout],
    model: Path,
    profiles: list[Profile],
    errors: list[str],
) -> list[Result]:
    """Results of all servers, each loaded alone.

    A server that fails leaves a line in `errors`, and the results that it gave before in the
    file. The others go on. With `--profile`, what was traced is appended to `profiles`.
    """
    results: list[Result] = []

    def measure(layout: Layout, server: ServerProcess) -> None:
        for result in ask(options, layout, server, model, profiles):
            results.append(result)

    errors += measure_servers(
        groups_of(options, layouts),
        options.ready_s,
        lambda layout: make_server(options, layout, model),
        measure,
    )
    return results


def ask(
    options: argparse.Namespace,
    layout: Layout,
    server: ServerProcess,
    model: Path,
    profiles: list[Profile],
) -> Iterator[Result]:
    """Load one server with each size, and write each result into the file."""
    for tokens in options.input_lens:
        for concurrency in options.concurrency:
            size = (concurrency, tokens)
            client = model.parent / "client.log"
            log = server.log_path
            traces = log.with_name("-".join(map(str, (log.stem, *size, "traces"))))
            result = load(options, server.base_url, model, client, traces, size)
            result = {"layout": layout.name, "model": options.model, **result}
            result["weights"] = options.weights
            # The same long list of arguments in every line.
            del result["server_info"]
            wanted = concurrency * options.rounds
            result["failed"] = wanted - result["completed"]
            expected = result["completed"] * options.output_len
            result["short"] = expected - result["total_output_tokens"]
            with options.jsonl.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            say(
                f"{layout.name}: {concurrency} x {tokens} tokens: "
                f"{result['completed']} of {wanted} in {result['duration']:.1f} s"
            )
            yield result
            if options.profile:
                profile = read_profile(
                    traces, options.profile, options.device, layout.name, size
                )
                profiles.append(profile)


def table(results: Sequence[Result]) -> str:
    head = "layout|input|at once|failed|req/s|out tok/s|TTFT ms|p99|ITL ms|p99|TPOT ms"
    columns = (
        *("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms"),
        *("median_itl_ms", "p99_itl_ms", "median_tpot_ms"),
    )
    rows = [head.split("|")]
    for result in results:
        size = (result["random_input_len"], result["max_concurrency"])
        cells = [f"{result[column]:.2f}" for column in columns]
        rows.append([result["layout"], *map(str, size), str(result["failed"]), *cells])
    return markdown(rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("jsonl", type=Path, help="where the results go; server logs beside it")
    add_engine_options(parser)
    add_server_options(parser)
    add("--concurrency", type=int, nargs="+", default=[8, 64], help="requests at once")
    add("--input-lens", type=int, nargs="+", default=[4096, 32768], help="tokens in")
    add("--output-len", type=int, default=128, help="tokens out, of each request")
    add("--rounds", type=int, default=2, help="requests of a run / --concurrency")
    add("--without-plain", action="store_true", help="no server without DCP")
    add("--profile", type=int, metavar="STEPS", help="trace so many steps of each run")
    add("--profile-host", action="store_true", help="trace the host too, for a viewer")
    options = parser.parse_args(argv)
    if options.profile is not None and options.profile < 1:
        parser.error(f"--profile {options.profile}: 1 step or more")
    if options.profile_host and options.profile is None:
        parser.error("--profile-host goes with --profile STEPS")
    options.jsonl = options.jsonl.absolute()
    fill_engine_defaults(parser, options, defaults=1)
    return options


def main() -> int:
    options = parse()
    options.jsonl.parent.mkdir(parents=True, exist_ok=True)
    options.jsonl.write_text("")
    errors: list[str] = []
    profiles: list[Profile] = []
    with tempfile.TemporaryDirectory() as folder:
        # SGLang cuts a request that would end at its context length.
        longest = max(options.input_lens) + options.output_len + 16
        model = Path(folder) / options.model.replace("/", "-")
        model.mkdir()
        write_model(model, options.model, longest, config_entries(options.quantization))
        # Beside a config.json its model type would choose the tokenizer's class.
        (Path(folder) / TOKENIZER).mkdir()
        write_tokenizer(Path(folder) / TOKENIZER, vocab_size(options.model))
        layouts = [options.plain] * (not options.without_plain) + options.layouts
        results = serve(options, layouts, model, profiles, errors)
    for result in results:
        if result["failed"] or result["short"]:
            errors.append(
                f"{result['layout']}: {result['failed']} requests failed, "
                f"{result['short']} output tokens missing"
            )
    print(
        f"\n{options.model}, {options.weights} weights, tp {options.tp}, "
        f"{options.output_len} output tokens\n"
    )
    print(table(results))
    if profiles:
        print("\n" + tables(profiles))
    print("\n" + ("\n".join(errors) or "every request was answered in full"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
