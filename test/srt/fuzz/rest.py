"""A server at rest: idle, its pool whole, its ranks in step, its memory."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from fuzz.client import Client, Lost
from fuzz.mixes import Ask

REST_SECONDS = 60.0
LAG_SECONDS = 3.0
_POLL_SECONDS = 0.03
# Token and pool counts that each rank keeps by itself. The name's label tells the rank.
_SAME_ON_RANKS = re.compile(
    r"sglang:(kv_\w+_tokens|num_running_reqs|num_queue_reqs|num_used_tokens"
    r"|realtime_tokens_total|evicted_tokens_total|max_total_num_tokens)\{(.*)\} (\S+)"
)
_TROUBLE = ("leak", "Traceback", "exception")
PROBE = Ask((1,), 1)


async def wait_idle(client: Client) -> None:
    """Wait until nothing runs or waits. Raises `Lost` after a minute."""
    end = time.monotonic() + REST_SECONDS
    while time.monotonic() < end:
        (load,) = json.loads(await client.get("/v1/loads"))["loads"]
        if not load["num_running_reqs"] and not load["num_waiting_reqs"]:
            return
        await asyncio.sleep(_POLL_SECONDS)
    raise Lost(f"the server is not idle after {REST_SECONDS:.0f} s: {load}")


async def settle(client: Client, ranks: int) -> None:
    """Flush the cache at idle, then check that each rank has its whole pool back.

    One more request shows that the server still answers. Its pages stay in the radix
    cache. Raises `Lost` for what is not so.
    """
    await flush(client)
    answer = await client.ask(PROBE)
    if answer.status != 200 or len(answer.outputs[0].ids) != 1:
        raise Lost(f"the request after the mix got {answer}")
    await wait_idle(client)
    await check_ranks(client, ranks)


async def flush(client: Client) -> None:
    """Empty the radix cache. Raises `Lost` if the server does not come to rest."""
    end = time.monotonic() + REST_SECONDS
    while time.monotonic() < end:
        await wait_idle(client)
        status, _ = await client.post("/flush_cache")
        if status == 200:
            return
        await asyncio.sleep(_POLL_SECONDS)
    raise Lost(f"the cache could not be flushed in {REST_SECONDS:.0f} s")


async def check_ranks(client: Client, ranks: int) -> None:
    """Compare what the ranks say of themselves. Raises `Lost` where they differ.

    The numbers of a rank may lag behind for a moment.
    """
    end = time.monotonic() + LAG_SECONDS
    while fault := _fault(rank_numbers(await client.get("/metrics")), ranks):
        if time.monotonic() > end:
            raise Lost(fault)
        await asyncio.sleep(_POLL_SECONDS)


def rank_numbers(metrics: str) -> dict[str, dict[str, float]]:
    """Counts by rank, then by name with all other labels."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _SAME_ON_RANKS.findall(metrics):
        rank = re.search(r'tp_rank="(\d+)"', labels)
        if rank:
            others = re.sub(r'(tp_rank|pid|moe_ep_rank)="\d+",?', "", labels)
            found.setdefault(rank[1], {})[f"{name} {others}"] = float(value)
    return found


def _fault(numbers: Mapping[str, Mapping[str, float]], ranks: int) -> str:
    """The first thing that is wrong with the numbers of a server at rest, or ""."""
    if len(numbers) != ranks:
        return f"numbers of {len(numbers)} ranks, expected {ranks}"
    first = numbers["0"]
    for rank, own in numbers.items():
        for name in first.keys() | own.keys():
            if own.get(name) != first.get(name):
                return (
                    f"rank {rank} has {own.get(name)} of {name}, rank 0 has "
                    f"{first.get(name)}"
                )
    plain = {name.split(" ")[0]: value for name, value in first.items()}
    # The probe may still be in the radix cache, nothing else.
    free = plain["kv_available_tokens"] + plain["kv_evictable_tokens"]
    if free != plain["max_total_num_tokens"]:
        return f"{free:.0f} of {plain['max_total_num_tokens']:.0f} tokens are free"
    return ""


def log_trouble(log_path: Path) -> list[str]:
    """Lines of a server's log that must not be there."""
    lines = log_path.read_text(errors="replace").splitlines()
    return [line for line in lines if any(word in line for word in _TROUBLE)]


def resident_bytes(group: int) -> dict[str, int]:
    """Resident memory of each process below `group`, the server's first process."""
    leader = psutil.Process(group)
    found = {}
    for process in (leader, *leader.children(recursive=True)):
        title = " ".join(process.cmdline())[:60]
        found[f"{process.pid} {title}"] = process.memory_info().rss
    return found
