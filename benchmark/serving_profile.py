"""Steps of a live server by what their GPU time goes to, from SGLang's own profiler.

`bench_serving.py --profile` has SGLang's load generator ask for a trace of the first prefill
and decode steps of a run. Rank 0's is read here. `step` is the time from the first kernel's
start to the last one's end, by steps: where it is well above `sum`, the GPU waits for the
host. Only GPU activity is traced, since tracing the host would slow it down.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode_profile import Kernel, Profile, profile_table
from decode_report import markdown

# As SGLang names its files.
STAGES = {"EXTEND": "prefill", "DECODE": "decode"}
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def generator_flags(folder: Path, steps: int, device: str) -> list[str]:
    """For SGLang's load generator: traces of `steps` steps of each kind into `folder`."""
    flags = ["--profile", "--profile-by-stage", "--profile-num-steps", str(steps)]
    activity = "GPU" if device == "cuda" else "CPU"
    return [
        *flags,
        "--profile-activities",
        activity,
        "--profile-output-dir",
        str(folder),
    ]


def read_profiles(
    folder: Path, steps: int, layout: str, size: Sequence[int]
) -> dict[str, Profile]:
    """By stage, what rank 0 left in `folder`; `size` is requests at once and their tokens.

    `steps` must have run without a step of the other stage between them, or SGLang ended
    the trace before.

    Raises
    ------
    RuntimeError
        If there is no trace of a stage.
    """
    profiles = {}
    for suffix, stage in STAGES.items():
        files = sorted(folder.rglob(f"*-TP-0*-{suffix}.trace.json.gz"))
        if not files:
            raise RuntimeError(f"no trace of {steps} {stage} steps in {folder}")
        with gzip.open(files[-1], "rt") as trace:
            events = json.load(trace)["traceEvents"]
        profiles[stage] = _profile(events, steps, layout, size)
    return profiles


def _profile(
    events: Sequence[dict[str, Any]], steps: int, layout: str, size: Sequence[int]
) -> Profile:
    ran = [event for event in events if event.get("cat") in ON_GPU]
    # On a CPU, torch's operators stand for kernels.
    ran = ran or [event for event in events if event.get("cat") == "cpu_op"]
    began = min(event["ts"] for event in ran)
    ended = max(event["ts"] + event["dur"] for event in ran)
    sums: dict[str, tuple[float, int]] = {}
    for event in ran:
        us, calls = sums.get(event["name"], (0.0, 0))
        sums[event["name"]] = us + event["dur"], calls + 1
    kernels = [
        Kernel(us / steps, calls / steps, name) for name, (us, calls) in sums.items()
    ]
    at_once, tokens = size
    return Profile(layout, tokens, at_once, (ended - began) / steps, kernels)


def tables(profiles: Sequence[dict[str, Profile]]) -> str:
    """A table for each size and stage, a column a layout."""
    parts = []
    for size in dict.fromkeys(
        (p.batch, p.context) for by in profiles for p in by.values()
    ):
        for stage in STAGES.values():
            found = [
                by[stage]
                for by in profiles
                if (by[stage].batch, by[stage].context) == size
            ]
            head = f"{stage}, {size[0]} at once x {size[1]} tokens, GPU time of rank 0"
            parts.append(f"{head}\n\n{markdown(profile_table(found))}")
    return "\n\n".join(parts)
