"""Live servers on GPUs: many cases, a few at a time, each gone once it has answered.

A start is mostly one core's work in each process, so several servers start side by side.
With more servers than the machine has cores for, all of them would time out. A server that fails
fails the tests that ask for it, the others go on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import gpu_checkpoints, shared_gpus, teacher_forcing
from helpers.doors import with_door
from helpers.gpu_nodes import make_nodes
from helpers.servers import READY_SECONDS, plugin_folder
from helpers.teacher_forcing import CountedReply
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerFailed, ServerProcess

# Cores that one server's processes keep busy while it starts.
CORES_PER_SERVER = 4
# Of one rank. The requests of `teacher_forcing.build_waves` need some 80K.
PER_RANK = 131072
RUNNING = 64
COMMON = (
    "--random-seed 0 --sampling-backend pytorch --log-level info "
    # Beyond the largest batch: a request amid its chunks takes a place of its own.
    f"--max-running-requests {RUNNING + 8} --cuda-graph-max-bs-decode {RUNNING} "
    # Its rounding to 16 bit would hide a part of every distance.
    "--decode-log-interval 1 --enable-fp32-lm-head"
)
# The fraction is of the memory that is free at start, and the other servers take from it
# meanwhile: it must not bite, the number of tokens does.
POOL = f"--max-total-tokens {PER_RANK} --mem-fraction-static 0.7"
ENVIRONMENT = {
    # Servers start beside each other, some on one GPU only.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    # A server that goes down waits a minute for core dumps that no one asked for.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}


def servers_at_once() -> int:
    """`SGLANG_DCP_TEST_SERVERS`, or what this machine's cores can start together."""
    cores = len(os.sched_getaffinity(0))
    return int(
        os.environ.get("SGLANG_DCP_TEST_SERVERS", max(1, cores // CORES_PER_SERVER))
    )


@dataclass(frozen=True)
class Spec:
    """One server: model kind, flags beside `COMMON`, a plugin's source, pool size.

    `kind` is a word of `helpers.gpu_checkpoints`, and `seed` is of its weights. `env` is
    more of its environment, by name and value. With several `nodes` it is as many launches,
    each of which sees GPUs of its own (`helpers.gpu_nodes`). In `flags`, `@seed1` and
    `@eagle3` stand for other checkpoints (`gpu_checkpoints.beside`). `loads` are LoRA
    adapters that it gets while it runs, before its requests, by name and by the word of
    their checkpoint.
    """

    name: str
    kind: str
    flags: str
    plugin: str = teacher_forcing.PLUGIN
    pool: str = POOL
    env: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    nodes: int = 1
    loads: tuple[tuple[str, str], ...] = ()

    @property
    def gpus(self) -> int:
        found = re.search(r"--tp (\d+)", self.flags)
        assert found, self.flags
        return int(found[1])

    def can_run(self) -> bool:
        return self.gpus <= shared_gpus.places() and not self.needs_own_gpus

    @property
    def shares(self) -> bool:
        """Whether its ranks share GPUs of this machine."""
        return shared_gpus.are_shared_by(self.gpus)

    @property
    def needs_own_gpus(self) -> str:
        """What makes it of no use here, because its ranks share GPUs; empty if nothing does.

        FlashInfer attends to latents with a cooperative kernel, whose blocks all run at once
        or not at all. A kernel of a peer that waits may hold room that it needs. Four ranks on
        one GPU hung in verifications with `symm_a2a`. Between nodes, ranks on one GPU have
        another reason why `symm_a2a` cannot serve.
        """
        if not self.shares:
            return ""
        if self.nodes > 1 and "symm_a2a" in self.flags:
            return "the reason why symm_a2a cannot serve"
        on_flashinfer = "--attention-backend flashinfer" in self.flags
        if on_flashinfer and self.kind.startswith("mla"):
            return "FlashInfer's kernel for latents"
        verifies = "--speculative-algorithm" in self.flags
        if verifies and "symm_a2a" in self.flags and self.gpus == 4:
            return "verifications whose four ranks exchange by symm_a2a"
        return ""

    def checkpoint(self, folder: Path) -> Path:
        """Its model, written into `folder` if not there."""
        return gpu_checkpoints.checkpoint(folder, self.kind, self.seed)

    def flags_in(self, folder: Path) -> str:
        """Its flags with the paths of other checkpoints, written if not there."""

        def written(found: re.Match[str]) -> str:
            return str(gpu_checkpoints.beside(folder, self.kind, self.seed, found[1]))

        return re.sub(r"@(\w+)", written, self.flags)

    def loads_in(self, folder: Path) -> dict[str, Path]:
        """The adapters that it gets while it runs, written if not there."""
        of = self.kind, self.seed
        return {
            name: gpu_checkpoints.beside(folder, *of, word) for name, word in self.loads
        }


class PrefillBatch(NamedTuple):
    """What SGLang's log says of a prefill batch, decoded tokens of mixed chunks left out."""

    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Run:
    """What a server left: its replies, what it said of itself, its log."""

    replies: dict[str, CountedReply]
    info: dict[str, Any]
    log: str

    def decode_batches(self, *, graph: bool) -> set[int]:
        """Sizes of the decode batches that ran, in a CUDA graph or eagerly."""
        line = rf"Decode batch.*#running-req: (\d+),.*cuda graph: {graph}"
        return {int(size) for size in re.findall(line, self.log)}

    def prefill_batches(self, *, graph: bool) -> set[PrefillBatch]:
        """The prefill batches that ran, in a CUDA graph or eagerly."""
        tokens = r"#new-token: (\d+), #cached-token: (\d+),"
        line = rf"Prefill batch.*{tokens}.*cuda graph: {graph}"
        found = re.findall(line, self.log)
        return {PrefillBatch(int(new), int(cached)) for new, cached in found}


def make_server(spec: Spec, folder: Path) -> ServerProcess:
    """Not started yet; its log and its plugin lie in `folder`, under its name."""
    own = folder / spec.name
    own.mkdir()
    source = with_door(spec.plugin, "shared_gpus") if spec.shares else spec.plugin
    plugin = plugin_folder(own, "forced_tokens", source)["PYTHONPATH"]
    path = os.pathsep.join(filter(None, (plugin, os.environ.get("PYTHONPATH"))))
    # What this machine needs, whatever the case (`benchmark/run_gpu.sh`).
    machine = os.environ.get("SGLANG_DCP_TEST_SERVER_FLAGS", "")
    flags = " ".join(
        (
            *(COMMON, spec.pool, teacher_forcing.CONTEXT_FLAGS, machine),
            spec.flags_in(folder),
            shared_gpus.FLAGS * spec.shares,
        )
    )
    shared = shared_gpus.environment(spec.gpus, spec.nodes) if spec.shares else {}
    env = {**ENVIRONMENT, **shared, **dict(spec.env), "PYTHONPATH": path}
    model = spec.checkpoint(folder)
    if spec.nodes > 1:
        return make_nodes(model, flags.split(), own, env, spec.nodes, spec.gpus)
    options: dict[str, Any] = dict(
        log_path=own / "server.log", env=env, grace=0.0, device="cuda"
    )
    if spec.shares:
        mps = shared_gpus.Mps()
        return shared_gpus.SharingServer(model, flags.split(), mps=mps, **options)
    return ServerProcess(model, flags.split(), **options)


@contextmanager
def live(spec: Spec, folder: Path) -> Iterator[ServerProcess]:
    """A server that answers; gone with all its processes afterwards."""
    with make_server(spec, folder) as server:
        server.wait_ready(READY_SECONDS)
        yield server


def load_adapters(server: ServerProcess, paths: Mapping[str, Path]) -> None:
    """Give LoRA adapters to a server that runs, by their names."""
    for name, path in paths.items():
        named = {"lora_name": name, "lora_path": str(path)}
        http_json(f"{server.base_url}/load_lora_adapter", named)


def _log_of(ended: ServerProcess) -> str:
    """Its log without Python's warning of "leaked shared_memory", which is no leak of KV."""
    lines = ended.log_path.read_text(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if "resource_tracker" not in line)


class Fleet:
    """Runs servers over one set of requests; `folder` keeps their logs.

    Without `forced` tokens, servers reply with their own.
    """

    def __init__(
        self,
        folder: Path,
        waves: Sequence[teacher_forcing.Wave],
        *,
        forced: bool = True,
    ) -> None:
        self._folder, self._waves, self._forced = folder, waves, forced
        self._pool = ThreadPoolExecutor(servers_at_once())
        self._runs: dict[Spec, Future[Run]] = {}
        self._live: set[ServerProcess] = set()

    @property
    def largest_batch(self) -> int:
        return max(len(wave) for wave in self._waves)

    def submit(self, specs: Iterable[Spec]) -> None:
        """Queue the servers that this machine can run and that are not queued yet."""
        for spec in specs:
            if spec.can_run() and spec not in self._runs:
                # Before the threads, which must not write one model at the same time.
                spec.checkpoint(self._folder)
                spec.flags_in(self._folder)
                spec.loads_in(self._folder)
                self._runs[spec] = self._pool.submit(self._serve, spec)

    def run(self, spec: Spec) -> Run:
        """What the server left; raises `ServerFailed`, with its log, if it failed."""
        self.submit([spec])
        return self._runs[spec].result()

    def close(self) -> None:
        """Also after Ctrl-C: no server is left, none is started any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for server in tuple(self._live):
            server.stop()
        self._pool.shutdown()

    def _serve(self, spec: Spec) -> Run:
        server = make_server(spec, self._folder)
        self._live.add(server)
        try:
            # Within one thread: the server ends with the thread that started it.
            with server:
                server.wait_ready(READY_SECONDS)
                load_adapters(server, spec.loads_in(self._folder))
                replies, info = self._ask(server)
            log = _log_of(server)
        finally:
            self._live.discard(server)
        if self._forced:
            # A head's name, or NEXTN, which is EAGLE by another name.
            eagle = info["speculative_algorithm"] in ("EAGLE", "EAGLE3", "NEXTN")
            sizes = self._waves, replies, info["page_size"]
            teacher_forcing.check_replies(*sizes, eagle=eagle)
        return Run(replies, info, log)

    def _ask(
        self, server: ServerProcess
    ) -> tuple[dict[str, CountedReply], dict[str, Any]]:
        try:
            replies = teacher_forcing.ask(server.base_url, self._waves)
            return replies, http_json(f"{server.base_url}/server_info")
        except (OSError, HTTPException) as error:
            raise ServerFailed(f"{error!r}; its log:\n{server.log_tail(40)}") from error


def run_fleet(
    folder: Path,
    waves: Sequence[teacher_forcing.Wave],
    specs: Iterable[Spec],
    *,
    forced: bool = True,
) -> Iterator[Fleet]:
    """Body of a fixture: a fleet with `specs` queued, gone with all its servers after."""
    fleet = Fleet(folder, waves, forced=forced)
    try:
        fleet.submit(specs)
        yield fleet
    finally:
        fleet.close()


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Values of parameter `name` in the chosen tests of the asking module, in order."""
    path = request.path
    items = [item for item in request.session.items if item.path == path]
    calls = [getattr(item, "callspec", None) for item in items]
    return [call.params[name] for call in calls if call and name in call.params]
