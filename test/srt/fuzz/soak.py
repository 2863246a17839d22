"""Many users at once, sampling, for minutes: nothing leaks, nothing hangs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from fuzz import rest
from fuzz.client import Client, Lost
from fuzz.mixes import Ask

USERS = 64
ROUND_MINUTES = 5
# Growth of a process after the first minute that is more than Python's own noise.
GROWTH_BYTES = 64 << 20
_WARM_SHARE = 0.25


@dataclass
class Soak:
    """Counts of a soak, and the longest time that a request took."""

    requests: int = 0
    tokens: int = 0
    aborted: int = 0
    disconnected: int = 0
    longest_seconds: float = 0.0
    growth: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        found = (
            f"{self.requests} requests, {self.tokens} tokens, {self.aborted} aborted, "
            f"{self.disconnected} disconnected, longest request "
            f"{self.longest_seconds:.1f} s"
        )
        if not self.growth:
            # It is measured at the end of a round.
            return found
        worst = max(self.growth.values()) / 2**20
        return f"{found}, largest growth of a process {worst:.1f} MiB"


async def soak(
    client: Client, group: int, ranks: int, longest: int, minutes: float, seed: int = 0
) -> Soak:
    """Load the server for some minutes, in rounds.

    After each round, when nothing runs, the server must have its whole pool back. So a soak
    that is cut short has shown something too. Raises `Lost`, alone or in a group, for what
    goes wrong.

    Parameters
    ----------
    group : int
        Process id of the server.
    ranks : int
        Number of its ranks.
    longest : int
        Tokens of the longest prompt that it takes.
    """
    found = Soak()
    rounds = max(1, round(minutes / ROUND_MINUTES))
    before: Mapping[str, int] = {}
    for number in range(rounds):
        seconds = 60 * minutes / rounds
        warm = await _load(client, group, longest, seconds, seed + number, found)
        await rest.settle(client, ranks)
        after = rest.resident_bytes(group)
        # One round has nothing before it but its own first part.
        before = before or (after if rounds > 1 else warm)
        found.growth = _growth(before, after)
        too_much = {k: v for k, v in found.growth.items() if v > GROWTH_BYTES}
        if too_much:
            raise Lost(f"processes grew by {too_much} bytes after {found}")
        print(f"round {number + 1} of {rounds}: {found}", flush=True)
    return found


async def _load(
    client: Client, group: int, longest: int, seconds: float, seed: int, found: Soak
) -> Mapping[str, int]:
    """One round of all users. Returns the memory of processes amid it."""
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        for i in range(USERS):
            draw = random.Random(1000 * seed + i)
            tasks.create_task(_user(client, draw, longest, end, found))
        tasks.create_task(_report(found, end))
        # A user that meets a fault ends this wait too.
        await asyncio.sleep(_WARM_SHARE * seconds)
        return rest.resident_bytes(group)


def _growth(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    if before.keys() != after.keys():
        raise Lost(f"processes were {sorted(before)} and are {sorted(after)}")
    return {name: after[name] - before[name] for name in before}


async def _report(found: Soak, end: float) -> None:
    """Print the counts each minute, so that a soak that is cut short shows them too."""
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(60, left))
        left = max(0.0, end - time.monotonic())
        print(f"{left / 60:.0f} minutes left of the round: {found}", flush=True)


async def _user(
    client: Client, draw: random.Random, longest: int, end: float, found: Soak
) -> None:
    """One request after the other, in a conversation that starts anew at times."""
    said: tuple[int, ...] = ()
    while time.monotonic() < end:
        if len(said) > longest // 2 or draw.random() < 0.3:
            said = ()
        room = max(1, min(longest // 2, 60))
        said += tuple(draw.randrange(256) for _ in range(draw.randint(1, room)))
        said = said[:longest]
        begin = time.monotonic()
        ids = await _sample(client, draw, said, found)
        found.longest_seconds = max(found.longest_seconds, time.monotonic() - begin)
        found.requests += 1
        found.tokens += len(ids)
        said += ids


async def _sample(
    client: Client, draw: random.Random, ids: tuple[int, ...], found: Soak
) -> tuple[int, ...]:
    """One sampled answer; some are aborted, some lose their reader."""
    kind, after = draw.random(), draw.uniform(0.05, 2.0)
    ask = Ask(
        ids,
        draw.randint(1, 32),
        stream=draw.random() < 0.5,
        temperature=1.0,
        top_p=0.9 if draw.random() < 0.3 else 1.0,
        abort_after=after if kind < 0.1 else 0.0,
        disconnect_after=after if 0.1 <= kind < 0.2 else 0.0,
    )
    answer = await client.ask(ask)
    output = answer.outputs[0] if answer.outputs else None
    if answer.status == 0:
        found.disconnected += 1
    elif output is None or output.finish == "abort":
        found.aborted += 1
        if not ask.abort_after:
            raise Lost(f"{answer} for {ask}, which no one aborted")
    elif not output.ids or output.finish not in ("length", "stop"):
        raise Lost(f"{answer} for {ask}")
    return tuple(output.ids) if output else ()
