"""Where a decode step's GPU time goes: kernels of one rank, by what they are for.

A kernel belongs to the first category whose pattern its name matches. A collective's
time includes waiting for the other ranks. Kernels may overlap, and the GPU may idle
between them: `sum` need not be `step`, the median time of a step without profiler
(`serving_profile.py`: the mean, with it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

LISTED = 25
CATEGORIES: tuple[tuple[str, str], ...] = (
    ("exchange", r"ncclDevKernel_SendRecv|AllToAll|alltoall|^reduce_heads$"),
    ("all-gather", r"all_?gather|^gather_heads$"),
    ("reduce", r"reduce_?scatter|all_?reduce|cross_device_reduce|multimem"),
    (
        "pack, merge",
        r"_(cut|combine|interleave|correct|merge_two)_kernel",
    ),
    ("localise", r"_fill_local_tensors_kernel"),
    ("KV write", r"store_?(kv_?)?cache|StoreKV|set_(mla_)?kv_buffer|reshape_and_cache"),
    # Before attention: FlashInfer's norms have its name in theirs, too.
    ("norm, RoPE", r"norm(?!al)|rotary|rope(?!rt)|act_and_mul|silu"),
    (
        "attention",
        r"flash|fmha|_fwd_(grouped_)?kernel|Batch(Decode|Prefill)|VariableLengthMerge"
        r"|prepare_varlen|^_reduce$|kv_indices|num_kv_splits|attention",
    ),
    (
        "GEMM, MoE",
        r"gemm|gemv|nvjet|cublas|splitK|cutlass|fused_moe|moe_|topk|expert|matmul"
        r"|mkldnn|addmm|::(mm|bmm|linear)$",
    ),
)
OTHER = "other"
NAMES = (*(name for name, _ in CATEGORIES), OTHER)


class Kernel(NamedTuple):
    """One kernel's microseconds and calls in a step."""

    us: float
    calls: float
    name: str


class Profile(NamedTuple):
    """A layout's kernels, and the time of its step."""

    layout: str
    context: int
    batch: int
    step_us: float
    kernels: list[Kernel]

    def __str__(self) -> str:
        total = sum(kernel.us for kernel in self.kernels)
        return f"profiled, {total:.0f} us in {len(self.kernels)} kernels"

    def listing(self) -> str:
        """The kernels that take most, one line each."""
        lines = [
            f"== {self.layout}, {self.context} x {self.batch}, step {self.step_us:.0f} us"
        ]
        for kernel in sorted(self.kernels, reverse=True)[:LISTED]:
            lines.append(
                f"{kernel.us:9.1f} us {kernel.calls:7.1f} calls "
                f"[{category(kernel.name)}] {kernel.name[:160]}"
            )
        return "\n".join(lines) + "\n"


def profiled(run: Callable[[], None], steps: int, device: str) -> list[Kernel]:
    """Kernels that `run` starts, per step; on a CPU, torch's operators stand for them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[activity]) as profiler:
        run()
    return [
        Kernel(
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / steps,
            event.count / steps,
            event.key,
        )
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]


def category(kernel: str) -> str:
    """The name of the first category that the kernel's name matches."""
    for name, pattern in CATEGORIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return OTHER


def by_category(kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    """Sum of each category, in the order of `NAMES`."""
    sums = {name: Kernel(0.0, 0.0, name) for name in NAMES}
    for kernel in kernels:
        name = category(kernel.name)
        us, calls, _ = sums[name]
        sums[name] = Kernel(us + kernel.us, calls + kernel.calls, name)
    return sums


def profile_table(profiles: Sequence[Profile]) -> list[list[str]]:
    """A line a category, a column a layout; microseconds and calls a step."""
    sums = [by_category(profile.kernels) for profile in profiles]
    rows = [["us a step (calls)", *(profile.layout for profile in profiles)]]
    for name in NAMES:
        cells = [f"{found[name].us:.0f} ({found[name].calls:.0f})" for found in sums]
        rows.append([name, *cells])
    totals = [sum(kernel.us for kernel in found.values()) for found in sums]
    rows.append(["sum", *(f"{total:.0f}" for total in totals)])
    rows.append(["step", *(f"{profile.step_us:.0f}" for profile in profiles)])
    return rows
