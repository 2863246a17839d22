"""What `bench_serving.py --profile` makes of SGLang's traces, without a GPU."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmark"))

import serving_profile  # noqa: E402

SIZE = (8, 4096)


def kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def write(
    folder: Path, stage: str, events: list[dict[str, Any]], rank: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"1700000000.5-TP-{rank}-{stage}.trace.json.gz"
    with gzip.open(file, "wt") as trace:
        json.dump({"traceEvents": events}, trace)


def test_a_step_lasts_from_the_first_kernel_to_the_last(tmp_path: Path) -> None:
    inner = tmp_path / "1700000000.1"
    prefill = [
        kernel("cudaLaunchKernel", 0.0, 900.0, "cuda_runtime"),
        kernel("flash_fwd", 100.0, 40.0),
        kernel("Memcpy HtoD", 150.0, 10.0, "gpu_memcpy"),
        kernel("flash_fwd", 460.0, 40.0),
        {"ph": "M", "name": "process_name"},
    ]
    write(inner, "EXTEND", prefill)
    write(inner, "EXTEND", [kernel("of another rank", 0.0, 9e9)], rank=1)
    write(inner, "DECODE", [kernel("reduce_heads", 5.0, 3.0)])
    found = serving_profile.read_profiles(tmp_path, 2, "2:a2a", SIZE)
    assert found["prefill"].step_us == 200.0
    assert {(k.name, k.us, k.calls) for k in found["prefill"].kernels} == {
        ("flash_fwd", 40.0, 1.0),
        ("Memcpy HtoD", 5.0, 0.5),
    }
    lines = serving_profile.tables([found]).splitlines()
    assert "prefill, 8 at once x 4096 tokens, GPU time of rank 0" in lines
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert ["", "attention", "40 (1)", ""] in cells
    assert ["", "exchange", "2 (0)", ""] in cells


def test_a_stage_without_a_trace_is_no_silence(tmp_path: Path) -> None:
    write(tmp_path, "EXTEND", [kernel("flash_fwd", 0.0, 1.0)])
    with pytest.raises(RuntimeError, match="no trace of 3 decode steps"):
        serving_profile.read_profiles(tmp_path, 3, "tp", SIZE)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
