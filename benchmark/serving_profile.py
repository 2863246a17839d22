"""The first steps of a live server's run by what their GPU time goes to.

`bench_serving.py --profile STEPS` has SGLang's load generator ask for a trace; rank 0's is
read here. While requests come in, SGLang prefills, so these are prefill steps wherever
enough prompt waits. `step` is the mean time of a step under the profiler, from the first
kernel's start to the last one's end: well above `sum`, this rank's GPU waits for its host.
Another rank's slow host shows as time of collectives. The host itself is traced only with
`--profile-host`, since that slows it down; for what it did, open the trace.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from decode_profile import Kernel, Profile, profile_table
from decode_report import markdown

# Of a trace's events; on a CPU, torch's operators stand for kernels, nested ones too.
KERNELS = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}


def generator_flags(
    folder: Path, steps: int, device: str, *, host: bool = False
) -> list[str]:
    """For SGLang's load generator: a trace of a run's first `steps` steps into `folder`."""
    activities = {"GPU"} if device == "cuda" else {"CPU"}
    if host:
        activities.add("CPU")
    flags = ["--profile", "--profile-num-steps", str(steps)]
    flags += ["--profile-activities", *sorted(activities)]
    return [*flags, "--profile-output-dir", str(folder)]


def read_profile(
    folder: Path, steps: int, device: str, layout: str, size: tuple[int, int]
) -> Profile:
    """What rank 0 left in `folder`; `size` is requests at once and their tokens.

    Raises
    ------
    RuntimeError
        If there is no trace, since the run had no more than `steps` steps, or an empty one.
    """
    # SGLang makes a folder in it, named by the time.
    files = sorted(folder.rglob("*-TP-0*.trace.json.gz"))
    if not files:
        raise RuntimeError(f"no trace in {folder}: no more than {steps} steps ran")
    with gzip.open(files[-1], "rt") as trace:
        events = json.load(trace)["traceEvents"]
    ran = [event for event in events if event.get("cat") in KERNELS[device]]
    if not ran:
        raise RuntimeError(f"{files[-1]}: no kernel in it")
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


def tables(profiles: Sequence[Profile]) -> str:
    """A table for each size, a column a layout."""
    parts = []
    for at_once, tokens in dict.fromkeys((p.batch, p.context) for p in profiles):
        found = [p for p in profiles if (p.batch, p.context) == (at_once, tokens)]
        head = f"first steps of {at_once} at once x {tokens} tokens, GPU time of rank 0"
        parts.append(f"{head}\n\n{markdown(profile_table(found))}")
    return "\n\n".join(parts)
