"""Makes a failing mix small. Pure: what fails is asked of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from typing import Any

from fuzz.mixes import Ask, Mix


def shrink(mix: Mix, fails: Callable[[Mix], bool], tries: int = 200) -> Mix:
    """Return a smaller mix that still fails.

    Each step takes the first smaller mix that fails, until none does or `tries` mixes
    were asked about. A failure that depends on time may be lost on the way; so a caller
    asks about a mix several times.
    """
    while tries > 0:
        for smaller in candidates(mix):
            tries -= 1
            if fails(smaller):
                mix = smaller
                break
            if tries <= 0:
                return mix
        else:
            return mix
    return mix


def candidates(mix: Mix) -> Iterator[Mix]:
    """Smaller mixes, those that leave out most first."""
    yield from _fewer_asks(mix)
    if mix.pauses:
        yield replace(mix, pauses=())
    if mix.flushes:
        yield replace(mix, flushes=())
    for index, ask in enumerate(mix.asks):
        for simpler in _simpler(ask):
            asks = (*mix.asks[:index], simpler, *mix.asks[index + 1 :])
            yield replace(mix, asks=asks)


def _fewer_asks(mix: Mix) -> Iterator[Mix]:
    size = len(mix.asks) // 2
    while size:
        for start in range(0, len(mix.asks), size):
            asks = mix.asks[:start] + mix.asks[start + size :]
            if asks:
                yield replace(mix, asks=asks)
        size //= 2


def _simpler(ask: Ask) -> Iterator[Ask]:
    for name, default in _defaults():
        if getattr(ask, name) != default:
            yield replace(ask, **{name: default})
    for length in (len(ask.ids) // 2, len(ask.ids) - 1):
        if length:
            start = min(ask.logprob_start_len, length - 1)
            yield replace(ask, ids=ask.ids[:length], logprob_start_len=start)
    for new_tokens in (ask.max_new_tokens // 2, ask.max_new_tokens - 1):
        if new_tokens:
            least = min(ask.min_new_tokens, new_tokens)
            yield replace(ask, max_new_tokens=new_tokens, min_new_tokens=least)


def _defaults() -> Iterator[tuple[str, Any]]:
    for each in fields(Ask):
        if each.default is not MISSING:
            yield each.name, each.default
        elif each.default_factory is not MISSING:
            yield each.name, each.default_factory()
