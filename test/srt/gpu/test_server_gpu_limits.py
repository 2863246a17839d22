"""Live servers on GPUs at their limits: capacity, one long request, a lost rank.

The capacity test compares what two servers make of the same free memory, one after the
other: nothing else may use the GPUs meanwhile.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BACKENDS,
    BF16,
    MARGIN,
    TP2_DCP2,
    TP4_ATTN2,
    TP4_DCP4,
    Case,
    Layout,
    fleet_fixture,
    measure,
    params,
)
from helpers.gpu_servers import Fleet, Spec, live
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess

pytestmark = [pytest.mark.server, needs_gpus(2)]

# Where plain tensor parallelism stores every K/V head DCP times.
REPLICATED = (
    ("llama-1kv-d128", TP2_DCP2),
    ("llama-2kv-d128", TP4_ATTN2),
    ("llama-1kv-d128", TP4_DCP4),
)
# Large enough that what DCP's groups and tables take is no part of the 2 % by itself.
ALL_THE_MEMORY = "--mem-fraction-static 0.4"
CAPACITY_TOLERANCE = 0.02

SMALL_PER_RANK = 4096
SMALL_POOL = f"--max-total-tokens {SMALL_PER_RANK} --mem-fraction-static 0.7"
# Together more than two ranks hold, so each one also evicts what was before.
LONG_PROMPTS = (5000, 6001, 7002)

# Also of the first forward, which may compile kernels.
WATCHDOG_S = 40
# SGLang's way down: it waits 5 s twice and prints the stacks of every rank.
WAY_DOWN_S = 40
# It looks at its counter twice in its timeout, so it may see the stall half of it late.
STALL_LIMIT_S = 1.5 * WATCHDOG_S + WAY_DOWN_S


@pytest.mark.parametrize(
    "kind, layout",
    [
        pytest.param(
            kind,
            layout,
            id=f"{kind}-{layout.name}",
            marks=needs_gpus(layout.tp_size),
        )
        for kind, layout in REPLICATED
    ],
)
def test_capacity_is_dcp_size_times_that_of_tp(
    kind: str, layout: Layout, tmp_path: Path
) -> None:
    common = f"{BF16.flags} --attention-backend fa3"
    flags = {"plain": f"--tp {layout.tp_size}", "dcp": layout.flags}
    tokens = [
        _capacity(Spec(name, kind, f"{common} {more}", pool=ALL_THE_MEMORY), tmp_path)
        for name, more in flags.items()
    ]
    gain = tokens[1] / tokens[0]
    print(
        f"{kind} {layout.name}: KV tokens {tokens[1]} with DCP, {tokens[0]} without, "
        f"{gain:.3f} x for DCP {layout.dcp_size}"
    )
    assert abs(gain / layout.dcp_size - 1) < CAPACITY_TOLERANCE


def _capacity(spec: Spec, folder: Path) -> int:
    with live(spec, folder) as server:
        info = http_json(f"{server.base_url}/server_info")
    return int(info["max_total_num_tokens"])


def long_waves() -> list[teacher_forcing.Wave]:
    draw = random.Random(3)
    prompts = [
        teacher_forcing.Prompt(
            f"long-{n}", tuple(draw.randrange(256) for _ in range(n)), 96
        )
        for n in LONG_PROMPTS
    ]
    last = prompts[-1]
    again = teacher_forcing.Prompt(
        "again", last.ids, last.new_tokens, shared=len(last.ids)
    )
    return [[prompt] for prompt in (*prompts, again)]


LONG = [
    Case(
        "llama-2kv-d128",
        TP2_DCP2,
        f"{backend}-small-pool",
        f"--attention-backend {backend} --page-size 16",
        pool=SMALL_POOL,
    )
    for backend in BACKENDS
]


fleet = fleet_fixture(long_waves)


@pytest.mark.parametrize("case", params(LONG))
def test_request_longer_than_a_rank_is_served(case: Case, fleet: Fleet) -> None:
    assert SMALL_PER_RANK < min(LONG_PROMPTS)
    info = fleet.run(case.spec).info
    assert info["max_total_num_tokens"] == case.layout.dcp_size * SMALL_PER_RANK
    found, spread = measure(case, fleet)
    assert found.mean < MARGIN * spread.mean


def test_request_longer_than_the_pool_of_plain_tp_is_refused(tmp_path: Path) -> None:
    flags = f"{BF16.flags} --tp 2 --attention-backend fa3"
    plain = Spec("plain-small", "llama-2kv-d128", flags, pool=SMALL_POOL)
    with live(plain, tmp_path) as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            teacher_forcing.ask(server.base_url, long_waves()[:1])
    assert caught.value.code == 400


@pytest.mark.parametrize(
    "lost, backend, limit_s",
    [
        pytest.param(signal.SIGKILL, "fa3", WAY_DOWN_S, id="dies"),
        pytest.param(signal.SIGSTOP, "triton", STALL_LIMIT_S, id="stalls"),
    ],
)
def test_lost_rank_ends_the_server(
    lost: signal.Signals, backend: str, limit_s: float, tmp_path: Path
) -> None:
    """Amid decode, so that the other rank waits for it inside a collective."""
    spec = Spec(
        "lost",
        "llama-2kv-d128",
        f"{BF16.flags} {TP2_DCP2.flags} --dcp-comm-backend a2a "
        f"--attention-backend {backend} --watchdog-timeout {WATCHDOG_S}",
    )
    endless = teacher_forcing.Prompt("endless", tuple(range(32, 64)), 30000)
    # The server goes first: the client waits for it.
    with ThreadPoolExecutor(1) as client, live(spec, tmp_path) as server:
        processes = _processes(server)
        answer = client.submit(teacher_forcing.ask, server.base_url, [[endless]])
        _wait_for_decode(server)
        os.kill(_scheduler(processes, rank=1).pid, lost)
        began = time.monotonic()
        server.wait_exit(limit_s)
        print(f"{lost.name}: the server ended after {time.monotonic() - began:.0f} s")
        assert isinstance(answer.exception(), (OSError, HTTPException))
        _, left = psutil.wait_procs(processes, timeout=20)
    assert not left


def _processes(server: ServerProcess) -> list[psutil.Process]:
    assert server._process is not None
    return psutil.Process(server._process.pid).children(recursive=True)


def _scheduler(processes: list[psutil.Process], rank: int) -> psutil.Process:
    [found] = [p for p in processes if f"scheduler_TP{rank}" in " ".join(p.cmdline())]
    return found


def _wait_for_decode(server: ServerProcess) -> None:
    """Until two more decode steps are in the log than warm-up left there."""
    before = _decode_steps(server)
    deadline = time.monotonic() + 60
    while _decode_steps(server) < before + 2:
        assert time.monotonic() < deadline, server.log_tail(40)
        time.sleep(0.1)


def _decode_steps(server: ServerProcess) -> int:
    return server.log_path.read_text(errors="replace").count("Decode batch")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
