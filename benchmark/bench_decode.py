"""Time of a decode step of whole engines over context length and batch size.

    python benchmark/bench_decode.py results.csv                  # model and layouts that
                                                                  # suit the GPUs at hand
    python benchmark/bench_decode.py results.csv --model Qwen3-30B-A3B --tp 8 \\
        --layouts 2:a2a 2:a2a:q 2:ag_rs 8:a2a:q --contexts 32768 131072 --batches 1 8 32

Each layout gets an engine of its own, one after the other. `tp` (no DCP) always comes first,
then the layouts of `--layouts`. They are written DCP:COMM, or DCP:COMM:q with the Q projection
replicated. `@BACKEND` after a layout names another attention backend for it. An engine is
SGLang's model runner, one process per GPU, with dummy weights, as a scheduler builds it
(plugins, hooks, pools, CUDA graphs). Nothing is prefilled: the KV pool is filled with random
keys and values, and requests get randomly scattered pages of it.

A step is `ModelRunner.forward` of one token per request, replayed as a CUDA graph (else the
run ends). The same small tensors are made before it as the scheduler makes. Steps follow each
other without waiting for the host, as under the overlap scheduler. A step's time is between
CUDA events, and the slowest rank counts. The table holds median and 95th percentile.
`host_ms` is the least that a step took the slowest host: a step can be no shorter.

`upstream:DCP` is SGLang's own DCP. It runs in processes that do not load this package, which
is verified. Pool filling, scattered pages, steps and clock are the same. It chooses its comm
backend itself: `a2a` for latents since 0.5.20, else `ag_rs`. Besides the exchange, two things
differ from ours:

- Its attention backend. It serves DCP only on `triton` for K/V heads and on `flashinfer` for
  latents. `tp@flashinfer` or `2:a2a:q@flashinfer` show how much of a difference that makes.
- Its fused rotary embedding and K/V write is off. Under its DCP it would write past the pool.

Two checks of the method take the place of the table:

--check-fill  compares with steps over a pool that was prefilled, with pages in the order of a
              fresh server; both in the same engine and in turns
--check-off   compares plain tensor parallelism with this package and without it, in turns;
              noise is how far the repeats of one side are apart

Not measured: scheduling, sampling, tokenizer and HTTP; prefill; requests of mixed length;
real weights, whose router may load experts less evenly; a tuned fused-MoE configuration,
if the installation has none for this GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import decode_report as report
from decode_options import add_engine_options, fill_engine_defaults
from decode_profile import Profile, profile_table
from decode_record import record, say


def measure(options: argparse.Namespace) -> int:
    """The table, the plot where it can be drawn, and the profiles."""
    profiles, failed = record(options, options.csv)
    records = report.read(options.csv)
    if records:
        print(f"\n{_title(options)}: ms a decode step, median (p95)\n")
        print(report.markdown(report.step_table(records)))
    if profiles:
        text = _profiles(profiles)
        name = options.csv.with_name(f"{options.csv.stem}-profile.txt")
        name.write_text(text + "\n".join(map(Profile.listing, profiles)))
        print(f"\n{text}kernels: {name}")
    if not importlib.util.find_spec("matplotlib"):
        print(f"no matplotlib here; elsewhere: decode_plot.py {options.csv.name}")
    elif records:
        from decode_plot import main as plot

        plot([str(options.csv)])
    return _failed(failed)


def _profiles(profiles: Sequence[Profile]) -> str:
    text = ""
    for size in dict.fromkeys((p.context, p.batch) for p in profiles):
        of_size = [p for p in profiles if (p.context, p.batch) == size]
        text += f"GPU time of rank 0, context {size[0]} x batch {size[1]}\n\n"
        text += report.markdown(profile_table(of_size)) + "\n\n"
    return text


def check_fill(options: argparse.Namespace) -> int:
    failed = record(options, options.csv).failed
    if failed:
        return _failed(failed)
    records = report.read(options.csv)
    table, good = report.fill_table(records)
    print(f"\n{_title(options)}\n\n{report.markdown(table)}")
    print(_verdict(good, f"within {100 * report.FILL_TOLERANCE:.0f} %"))
    return 0 if good else 1


def check_off(options: argparse.Namespace) -> int:
    records: list[report.Record] = []
    plugins = os.environ.get("SGLANG_PLUGINS", "")
    with tempfile.TemporaryDirectory() as folder:
        for run in range(2 * options.pairs):
            file = Path(folder) / f"{run}.csv"
            side = "without" if run % 2 == 0 else "with"
            off = side == "without"
            os.environ["SGLANG_PLUGINS"] = options.off_plugins if off else plugins
            say(f"run {run + 1} of {2 * options.pairs}: {side} the package")
            _run_side(options, file)
            found = report.read(file)
            if {r["package"] for r in found} != {"out" if off else "in"}:
                raise RuntimeError(f"the package was not {side} in run {run + 1}")
            records += ({"run": str(run + 1), **r} for r in found)
    with options.csv.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, records[0])
        writer.writeheader()
        writer.writerows(records)
    table, good = report.off_table(records)
    print(f"\n{_title(options)}, no DCP flag\n\n{report.markdown(table)}")
    print(_verdict(good, "within noise"))
    return 0 if good else 1


def _failed(layouts: Sequence[str]) -> int:
    if layouts:
        print(f"FAILED: {', '.join(layouts)}")
    return 1 if layouts else 0


def _side(options: argparse.Namespace, file: Path) -> None:
    sys.exit(_failed(record(options, file).failed))


def _run_side(options: argparse.Namespace, file: Path) -> None:
    # A process of its own: plugins cannot be taken out again.
    side = mp.get_context("spawn").Process(target=_side, args=(options, file))
    side.start()
    side.join()
    if side.exitcode:
        raise RuntimeError(f"a run ended with {side.exitcode}")


def _title(options: argparse.Namespace) -> str:
    return (
        f"{options.model}, tp {options.tp}, {options.attention_backend}, "
        f"page {options.page_size}, KV {options.kv_cache_dtype}, "
        f"{options.weights} weights"
    )


def _verdict(good: bool, bar: str) -> str:
    return f"\n{'good' if good else 'FAILED: not'} {bar}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("csv", type=Path, help="where the results go; plot and profiles beside it")
    add_engine_options(parser)
    add("--contexts", type=int, nargs="+")
    add("--batches", type=int, nargs="+")
    add("--steps", type=int, default=40)
    add("--profile", type=int, nargs=2, action="append", metavar=("CONTEXT", "BATCH"))
    add("--turns", type=Path, help="a file: runs that name it take turns on the GPUs")
    add("--pairs", type=int, default=3, help="of engines, in --check-off")
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--check-fill", action="store_true")
    check.add_argument("--check-off", action="store_true")
    options = parser.parse_args(argv)
    named = options.layouts is not None
    fill_engine_defaults(parser, options)
    if options.check_off and options.pairs < 2:
        parser.error("--pairs below 2 leaves nothing to tell noise by")
    _fill_sizes(options, named)
    for size in options.profile:
        if size[0] not in options.contexts or size[1] not in options.batches:
            parser.error(f"--profile {size[0]} {size[1]} is no size of this run")
    return options


def _fill_sizes(options: argparse.Namespace, layouts_named: bool) -> None:
    contexts, batches = [32768, 131072, 262144, 524288], [1, 8, 32]
    if options.check_fill:
        contexts, batches = [8192], [4]
        if not layouts_named:
            del options.layouts[1:]
    if options.check_off:
        contexts, batches = [8192, 131072], [1, 8]
        options.layouts = []
    options.contexts = options.contexts or contexts
    options.batches = options.batches or batches
    options.profile = options.profile or []


def main() -> int:
    options = parse()
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    if options.check_off:
        return check_off(options)
    return check_fill(options) if options.check_fill else measure(options)


if __name__ == "__main__":
    sys.exit(main())
