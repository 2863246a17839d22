"""Sends mixes to a pair of servers and compares, with the reference a little ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from fuzz import rest
from fuzz.client import Answer, Client, Lost, run_alone
from fuzz.compare import Counts, Judge
from fuzz.mixes import Mix
from fuzz.servers import Setting
from fuzz.shrink import shrink

# Mixes that the reference may be ahead.
_AHEAD = 4
_Answered = asyncio.Queue[tuple[Mix, list[Answer]] | None]


@dataclass
class Result:
    """What a run of mixes gave. `failed` are the mixes with what is wrong in them."""

    mixes: int = 0
    counts: Counts = field(default_factory=Counts)
    failed: list[tuple[Mix, list[str]]] = field(default_factory=list)


async def drive(
    tested: Client, reference: Client, setting: Setting, mixes: Iterable[Mix]
) -> Result:
    """Run all mixes. Raises a group of `Lost` where a server no longer serves."""
    judge = Judge(setting.longest_prompt)
    result = Result(counts=judge.counts)
    queue: _Answered = asyncio.Queue(_AHEAD)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_answer_all(reference, setting, mixes, queue))
        while (item := await queue.get()) is not None:
            mix, want = item
            faults = await run_mix(tested, setting, judge, mix, want)
            result.mixes += 1
            if faults:
                result.failed.append((mix, faults))
    return result


async def _answer_all(
    reference: Client, setting: Setting, mixes: Iterable[Mix], queue: _Answered
) -> None:
    for mix in mixes:
        await queue.put((mix, await run_alone(reference, mix, setting.longest_prompt)))
    await queue.put(None)


async def run_mix(
    tested: Client, setting: Setting, judge: Judge, mix: Mix, want: list[Answer]
) -> list[str]:
    """Faults of one mix. Raises `Lost`, with the mix, where the server is in trouble."""
    try:
        got = await tested.run(mix)
        await rest.settle(tested, setting.ranks)
    except (Lost, OSError, ExceptionGroup) as error:
        raise Lost(f"seed {mix.seed}: {_causes(error)}\n{mix.to_json()}") from error
    return judge.faults(mix, got, want)


def _causes(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        return "; ".join(_causes(each) for each in error.exceptions)
    return repr(error)


async def minimize(
    tested: Client, reference: Client, setting: Setting, mix: Mix, repeat: int = 3
) -> Mix:
    """The least mix that still fails in one of `repeat` runs."""
    loop = asyncio.get_running_loop()

    async def once(smaller: Mix) -> bool:
        want = await run_alone(reference, smaller, setting.longest_prompt)
        for _ in range(repeat):
            judge = Judge(setting.longest_prompt)
            if await run_mix(tested, setting, judge, smaller, want):
                return True
        return False

    def fails(smaller: Mix) -> bool:
        return asyncio.run_coroutine_threadsafe(once(smaller), loop).result()

    return await asyncio.to_thread(shrink, mix, fails)
