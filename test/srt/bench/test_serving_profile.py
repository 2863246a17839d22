"""What `bench_serving.py --profile` makes of SGLang's traces, without a GPU."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.gloo_ranks import run_python
from serving_profile import generator_flags, read_profile, tables

SIZE = (8, 4096)
Event = dict[str, Any]


def event(name: str, ts: float, dur: float, cat: str = "kernel") -> Event:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def write(folder: Path, events: list[Event], rank: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"1700000000.5-TP-{rank}.trace.json.gz"
    with gzip.open(file, "wt") as trace:
        json.dump({"traceEvents": events}, trace)


def test_a_step_lasts_from_the_first_kernel_to_the_last(tmp_path: Path) -> None:
    write(
        tmp_path / "1700000000.1",
        [
            event("cudaLaunchKernel", 0.0, 900.0, "cuda_runtime"),
            event("aten::mm", 0.0, 900.0, "cpu_op"),
            event("flash_fwd", 100.0, 40.0),
            event("Memcpy HtoD", 150.0, 10.0, "gpu_memcpy"),
            event("flash_fwd", 460.0, 40.0),
            {"ph": "M", "name": "process_name"},
        ],
    )
    write(tmp_path / "1700000000.1", [event("of another rank", 0.0, 9e9)], rank=1)
    found = read_profile(tmp_path, 2, "cuda", "2:a2a", SIZE)
    assert found.step_us == 200.0
    assert {(k.name, k.us, k.calls) for k in found.kernels} == {
        ("flash_fwd", 40.0, 1.0),
        ("Memcpy HtoD", 5.0, 0.5),
    }
    on_cpu = read_profile(tmp_path, 2, "cpu", "tp", SIZE)
    assert [k.name for k in on_cpu.kernels] == ["aten::mm"]
    lines = tables([found, on_cpu]).splitlines()
    assert lines[0] == "first steps of 8 at once x 4096 tokens, GPU time of rank 0"
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert ["", "attention", "40 (1)", "0 (0)", ""] in cells
    assert ["", "step", "200", "450", ""] in cells


@pytest.mark.parametrize("events", [None, [event("aten::mm", 0.0, 1.0, "cpu_op")]])
def test_no_trace_is_no_silence(events: list[Event] | None, tmp_path: Path) -> None:
    if events is not None:
        write(tmp_path, events)
    with pytest.raises(RuntimeError, match="no more than 3 steps ran|no kernel in it"):
        read_profile(tmp_path, 3, "cuda", "tp", SIZE)


# Under its own command line the load generator would look for a server: only parse it.
PARSE = """
import argparse, sys
from sglang.benchmark import serving
seen = []
argparse.ArgumentParser.parse_args = lambda self, *a: seen.append(self)
try:
    serving.cli_main()
except (AttributeError, TypeError):
    pass
[parser] = seen
args, unknown = parser.parse_known_args(sys.argv[1:])
print("got", args.profile, args.profile_num_steps, args.profile_activities, unknown)
"""


@pytest.mark.parametrize(
    "device, host, traced",
    [
        ("cuda", False, ["GPU"]),
        ("cuda", True, ["CPU", "GPU"]),
        ("cpu", False, ["CPU"]),
    ],
)
def test_the_load_generator_knows_these_flags(
    device: str, host: bool, traced: list[str], tmp_path: Path
) -> None:
    flags = generator_flags(tmp_path, 16, device, host=host)
    done = run_python("-c", PARSE, *flags, timeout_s=120)
    assert f"got True 16 {traced} []" in done.stdout, done.stderr[-2000:]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
