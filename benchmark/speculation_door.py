"""Opens the door of speculation to servers with DCP, as the live tests do.

DCP refuses all algorithms on CPUs. The plugin of these tests, in
`test/srt/helpers/speculation.py`, allows them in the processes of one run, and brings the
kernels that SGLang lacks there. On GPUs it can replace the corpus of NGRAM.
"""

from __future__ import annotations

from pathlib import Path

from doors import add_tests, plugin_env
from speculation_drafts import ALGORITHMS


def open_door(folder: Path, device: str, shared_by: int = 0) -> dict[str, str]:
    """Return the environment of servers that may speculate; the plugin goes to `folder`.

    With `shared_by` ranks, these share the GPUs (`test/srt/helpers/shared_gpus.py`).
    """
    add_tests()
    from helpers import shared_gpus, speculation
    from helpers.doors import with_door

    source = speculation.DOOR
    if shared_by:
        source = with_door(source, "shared_gpus")
    env = {
        **(shared_gpus.environment(shared_by) if shared_by else {}),
        **plugin_env(folder, "speculation_door", source),
        speculation.SERVED: ",".join(ALGORITHMS.values()),
    }
    if device == "cpu":
        # SGLang compiles the steps of a draft, which takes minutes of a CPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env
