"""Servers that are several launches: "nodes" on this machine, which meet over loopback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.servers import READY_SECONDS, launched
from sglang_dcp.demo.server import ServerProcess, free_port


def launched_nodes(
    model: Path,
    flags: str,
    own: Sequence[str] = ("", ""),
    env: Mapping[str, str] | None = None,
) -> list[ServerProcess]:
    """One server to enter for each element of `own`, which has flags of that node.

    Flags of `own` come last, so they win: also over `--node-rank`.
    """
    meet = f"--nnodes {len(own)} --dist-init-addr 127.0.0.1:{free_port()}"
    return [
        launched(model, f"{flags} {meet} --node-rank {rank} {more}", env)
        for rank, more in enumerate(own)
    ]


@contextmanager
def nodes(
    model: Path, flags: str, count: int = 2, env: Mapping[str, str] | None = None
) -> Iterator[list[ServerProcess]]:
    """Nodes that serve; gone with all their processes afterwards. Node 0 has the HTTP."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(node)
            for node in launched_nodes(model, flags, [""] * count, env)
        ]
        started[0].wait_ready(READY_SECONDS)
        yield started


def logs(started: Sequence[ServerProcess]) -> list[str]:
    return [node.log_path.read_text(errors="replace") for node in started]


def node_args(**changes: Any) -> SimpleNamespace:
    """The part of SGLang's resolved arguments that tells one node from another."""
    found = dict(
        tp_size=4,
        dp_size=1,
        nnodes=2,
        node_rank=1,
        dist_init_addr="host:1",
        dist_timeout=None,
        watchdog_timeout=300,
        attention_backend="torch_native",
        disable_chunked_prefix_cache=False,
        flashinfer_mla_disable_ragged=False,
        dtype="float32",
        kv_cache_dtype="auto",
        max_running_requests=None,
        cuda_graph_config=None,
    )
    return SimpleNamespace(**{**found, **changes})
