"""Sends mixes to a pair of servers and compares, with the reference a little ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
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
    tested: Client,
    reference: Client,
    setting: Setting,
    mixes: Iterable[Mix],
    on_faults: Callable[[Mix, list[str]], None] = lambda mix, faults: None,
    together: int = 3,
) -> Result:
    """Run all mixes. Raises a group of `Lost` where a server no longer serves.

    `on_faults` is called for each mix that fails, at once. So many mixes run `together`:
    it takes less time, and the pool is fuller.
    """
    judge = Judge(setting.longest_prompt)
    result = Result(counts=judge.counts)
    queue: _Answered = asyncio.Queue(_AHEAD * together)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_answer_all(reference, setting, mixes, queue))
        while group := await _next(queue, together):
            for mix, _, faults in await run_mixes(tested, setting, judge, group):
                result.mixes += 1
                if faults:
                    result.failed.append((mix, faults))
                    on_faults(mix, faults)
    return result


async def _next(queue: _Answered, count: int) -> list[tuple[Mix, list[Answer]]]:
    """At most so many mixes; none at the end, and then at every call."""
    group: list[tuple[Mix, list[Answer]]] = []
    while len(group) < count:
        item = await queue.get()
        if item is None:
            queue.put_nowait(None)
            break
        group.append(item)
    return group


async def _answer_all(
    reference: Client, setting: Setting, mixes: Iterable[Mix], queue: _Answered
) -> None:
    for mix in mixes:
        await queue.put((mix, await run_alone(reference, mix, setting.longest_prompt)))
    await queue.put(None)


async def run_mixes(
    tested: Client,
    setting: Setting,
    judge: Judge,
    group: Sequence[tuple[Mix, list[Answer]]],
) -> list[tuple[Mix, list[Answer], list[str]]]:
    """Run mixes side by side: each with its answers, and what is wrong with them.

    `group` has them with the reference's answers. Raises `Lost`, with the mixes, where
    the server is in trouble.
    """
    mixes = [mix for mix, _ in group]
    try:
        answers = await asyncio.gather(*map(tested.run, mixes))
        await rest.settle(tested, setting.ranks)
    except (Lost, OSError, ExceptionGroup) as error:
        texts = "\n".join(mix.to_json() for mix in mixes)
        raise Lost(f"{_causes(error)}\n{texts}") from error
    cut = any(mix.aborts_all for mix in mixes)
    return [
        (mix, got, judge.faults(mix, got, want, cut))
        for (mix, want), got in zip(group, answers)
    ]


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
            group = [(smaller, want)]
            ((_, _, faults),) = await run_mixes(tested, setting, judge, group)
            if faults:
                return True
        return False

    def fails(smaller: Mix) -> bool:
        return asyncio.run_coroutine_threadsafe(once(smaller), loop).result()

    return await asyncio.to_thread(shrink, mix, fails)
