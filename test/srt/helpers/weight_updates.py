"""New weights for live servers on GPUs: from disk, from tensors and over IPC.

The server needs the package checkpoint-engine for weights over IPC. SGLang does not install
it. For a machine without a network, unzip its wheel, which is plain Python, and put the
folder on PYTHONPATH of the tests: servers get it too. `loguru`, `httpx` and what else it
imports come with SGLang.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

import pytest

from helpers import ipc_weights, teacher_forcing
from helpers.generate import flush_cache
from helpers.gpu_cases import TP2_DCP2
from helpers.gpu_servers import Spec, make_server
from helpers.ipc_weights import Named, Shared
from helpers.servers import READY_SECONDS
from helpers.shared_gpus import SharingServer, device_of, uuid_of
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.releases.installed import in_range, sglang_version

Update = Callable[[str, Path], None]


def from_disk(base_url: str, checkpoint: Path) -> None:
    post(base_url, "update_weights_from_disk", {"model_path": str(checkpoint)})


def from_tensors(base_url: str, checkpoint: Path) -> None:
    """In several requests, as a trainer sends them. All ranks read this process's GPU 0."""
    from safetensors.torch import load_file
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    named = sorted(load_file(checkpoint / "model.safetensors", device="cuda:0").items())
    buckets = ipc_weights.buckets_of(named)
    # SGLang refuses tensors outside such a session as of 0.5.23, and has none before.
    in_session = in_range(sglang_version(), "0.5.23", None)
    if in_session:
        post(base_url, "begin_weight_update", {})
    for place, bucket in enumerate(buckets, 1):
        parts = [
            MultiprocessingSerializer.serialize(bucket, output_str=True)
            for _ in range(TP2_DCP2.tp_size)
        ]
        last = place == len(buckets)
        post(
            base_url,
            "update_weights_from_tensor",
            {"serialized_named_tensors": parts, "flush_cache": last},
        )
    if in_session:
        post(base_url, "end_weight_update", {})


def from_ipc(base_url: str, checkpoint: Path) -> None:
    """In several buckets, as checkpoint-engine sends them. Each rank reads its own GPU."""
    named = stored(checkpoint)
    room = ipc_weights.room(named)
    shared = {
        f"GPU-{uuid_of(rank)}": ipc_weights.on_gpu(device_of(rank), room)
        for rank in range(TP2_DCP2.tp_size)
    }
    send_over_ipc(base_url, named, shared)


def stored(checkpoint: Path) -> list[Named]:
    """Return names and tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return sorted(load_file(checkpoint / "model.safetensors").items())


def send_over_ipc(
    base_url: str, named: Sequence[Named], shared: Mapping[str, Shared]
) -> None:
    """Send the weights to all ranks at once, each through a buffer of its own.

    Parameters
    ----------
    base_url : str
        The server.
    named
        Names and tensors of a checkpoint.
    shared
        Handle and buffer of each rank, by SGLang's key of its device.

    Raises
    ------
    AssertionError
        SGLang says that the update failed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(len(shared)) as pool,
    ):
        handles = {key: f"ipc://{folder}/{key}" for key in shared}
        sends = [
            pool.submit(ipc_weights.send, handles[key], shared[key], named)
            for key in shared
        ]
        post(base_url, "update_weights_from_ipc", {"zmq_handles": handles})
        for sent in sends:
            sent.result()


def post(base_url: str, endpoint: str, body: dict[str, object]) -> None:
    """Raise AssertionError with SGLang's message if it refuses the request."""
    try:
        answer = http_json(f"{base_url}/{endpoint}", body)
    except HTTPError as error:
        raise AssertionError(f"/{endpoint}: {error.read().decode()}") from error
    assert answer["success"], answer


UPDATES = (
    from_disk,
    from_tensors,
    pytest.param(
        from_ipc,
        marks=pytest.mark.skipif(
            find_spec("checkpoint_engine") is None,
            reason="checkpoint-engine is not on PYTHONPATH",
        ),
        id="from_ipc",
    ),
)


def send(update: Update, server: ServerProcess, checkpoint: Path) -> None:
    """Run `update` in a process of its own, which can share memory with the ranks.

    Raises
    ------
    subprocess.CalledProcessError
        The update failed. What it says is in the output of the test.
    """
    shared = server.shared_environment if isinstance(server, SharingServer) else {}
    command = [sys.executable, "-m", __name__, update.__name__]
    subprocess.run(
        [*command, server.base_url, str(checkpoint)],
        env={**os.environ, **shared},
        check=True,
    )


def assert_answers_as_loaded(
    old: Spec, new: Spec, update: Update, folder: Path
) -> None:
    """A server of `old`, updated to the weights of `new`, answers as a server of `new`."""
    waves = teacher_forcing.build_waves()[:-1]
    with make_server(old, folder) as updated, make_server(new, folder) as loaded:
        for server in (updated, loaded):
            server.wait_ready(READY_SECONDS)
        before = teacher_forcing.ask(updated.base_url, waves)
        # An update that finds the last request not yet put away fails.
        flush_cache(updated.base_url)
        send(update, updated, new.checkpoint(folder))
        after = teacher_forcing.ask(updated.base_url, waves)
        wanted = teacher_forcing.ask(loaded.base_url, waves)
    far, near = (teacher_forcing.distance(found, wanted) for found in (before, after))
    print(f"{old.kind}, {update.__name__}: |d logprob| before {far}; after {near}")
    assert near.mean < far.mean / 100
    assert near.worst_request < far.worst_request / 20


if __name__ == "__main__":
    name, url, new_weights = sys.argv[1:]
    globals()[name](url, Path(new_weights))
