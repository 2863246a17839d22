"""Notes in the ranks of servers what a forward takes on its GPU at most.

A plugin asks torch's allocator around each forward: the peak, less what was allocated
before. So pools, weights and graphs do not count, SGLang's own activations do. Each rank
leaves its highest number in a file of its own.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from doors import plugin_env

FOLDER = "SGLANG_DCP_BENCH_PEAKS"


def around_forward(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Do `ModelRunner.forward`, and note its peak if it is the highest of this rank.

    A file that was removed starts the count again.
    """
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = original(runner, *args, **kwargs)
    taken = torch.cuda.max_memory_allocated() - before
    rank = torch.cuda.current_device()
    file = Path(os.environ["SGLANG_DCP_BENCH_PEAKS"]) / f"rank{rank}"
    try:
        known = int(file.read_text())
    except FileNotFoundError:
        # The reader took it.
        known = 0
    if taken > known:
        # The reader never sees half a number.
        partial = file.with_suffix(".partial")
        partial.write_text(str(taken))
        partial.replace(file)
    return result


PLUGIN = f"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

{inspect.getsource(around_forward)}

def load():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        around_forward,
        HookType.AROUND,
    )
"""


def open_door(folder: Path) -> dict[str, str]:
    """Return the environment of a server whose ranks note their peaks in `folder`."""
    return {**plugin_env(folder, "memory_door", PLUGIN), FOLDER: str(folder)}


def take_peaks(folder: Path) -> list[int]:
    """Return the peak of each rank since the last call, in bytes; none without a forward."""
    files = sorted(folder.glob("rank*[0-9]"))
    peaks = [int(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    return peaks
