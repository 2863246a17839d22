"""Opens the door of speculation to servers with DCP, as the live tests do.

DCP refuses all algorithms on CPUs. The plugin of these tests, in
`test/srt/helpers/speculation.py`, allows them in the processes of one run, and brings the
kernels that SGLang lacks there. On GPUs it can replace the corpus of NGRAM.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from speculation_drafts import ALGORITHMS

TESTS = Path(__file__).resolve().parents[1] / "test" / "srt"


def open_door(folder: Path, device: str) -> dict[str, str]:
    """Return the environment of servers that may speculate; the plugin goes to `folder`."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from helpers import speculation
    from helpers.servers import plugin_folder

    folder.mkdir()
    path = plugin_folder(folder, "speculation_door", speculation.DOOR)["PYTHONPATH"]
    inherited = os.environ.get("PYTHONPATH")
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, (path, inherited))),
        speculation.SERVED: ",".join(ALGORITHMS.values()),
    }
    if device == "cpu":
        # SGLang compiles the steps of a draft, which takes minutes of a CPU.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env
