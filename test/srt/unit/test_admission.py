"""The next chunk of a prompt in a KV pool that is full of requests that decode.

Only here is each side of the rule seen. `test_reports.py` has a live server whose chunk waits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.needs_sglang import needs_sglang
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import admission
from sglang_dcp.hooks.admission import add_chunked_req

PAGE, CHUNK, CACHED = 8, 32, 64


@pytest.fixture
def dcp_on() -> Iterator[None]:
    set_context(DcpContext(DcpConfig(Layout(2, 1)), 0))
    yield
    clear_context()


@pytest.fixture(autouse=True)
def known_release(monkeypatch: pytest.MonkeyPatch) -> None:
    api = SimpleNamespace(cached_tokens=lambda req: req.cached)
    monkeypatch.setattr(admission, "sglang_api", lambda: api)


def request(left: int) -> Any:
    ids = [0] * (CACHED + left)
    return SimpleNamespace(full_untruncated_fill_ids=ids, cached=CACHED)


def adder(total: float, now: int) -> Any:
    """Tokens left beside what running requests may need, and tokens left now."""
    return SimpleNamespace(
        rem_total_tokens=total,
        cur_rem_tokens=now,
        rem_chunk_tokens=CHUNK,
        page_size=PAGE,
    )


def taken(total: float, now: int, left: int) -> bool:
    """Whether SGLang's function got the request."""
    req, calls = request(left), []
    given = adder(total, now)

    def original(*arguments: Any) -> str:
        calls.append(arguments)
        return "theirs"

    answer = add_chunked_req(original, given, req)
    if not calls:
        assert answer is req
        return False
    assert answer == "theirs" and calls == [(given, req)]
    return True


@pytest.mark.usefixtures("dcp_on")
@pytest.mark.parametrize(
    ("total", "now", "left", "wanted"),
    [
        # SGLang cuts the chunk to what is left.
        (1, 8, 100, True),
        # Less than a token is none: it would take a whole chunk.
        (0.5, 0, 100, False),
        # Running requests may need all of it later, and there is room now.
        (-50, 40, 100, True),
        (-50, 39, 100, False),
        # The end of a prompt needs fewer pages than a chunk.
        (0, 16, 1, True),
        (0, 15, 1, False),
        (-1, 24, 9, True),
        (-1, 23, 9, False),
        (-300, 0, 33, False),
    ],
)
def test_a_chunk_waits_until_there_is_room(
    total: float, now: int, left: int, wanted: bool
) -> None:
    assert taken(total, now, left) is wanted


def test_without_dcp_sglang_decides() -> None:
    assert taken(-300, 0, 33)


@needs_sglang("0.5.23", "the budget is a class since SGLang 0.5.23")
def test_sglang_itself_takes_a_chunk_without_room() -> None:
    """If this fails, SGLang waits by itself, and the hook may go."""
    from sglang.srt.mem_cache.prefill_budget import PrefillBudget

    allocator = SimpleNamespace(page_size=PAGE, available_size=lambda: 0)
    cache = SimpleNamespace(supports_mamba=lambda: False, evictable_size=lambda: 0)
    budget = PrefillBudget(allocator, cache, num_mixed_decode_tokens=3)
    for left in (-3, 0, 0.5):
        budget.total_offset = -left
        assert budget.remaining_total == left and budget.remaining_current < 0
        assert budget.available_chunk_tokens(CHUNK) == CHUNK


def test_the_scheduler_has_what_is_read() -> None:
    from sglang.srt.managers.schedule_policy import PrefillAdder

    for name in ("rem_total_tokens", "cur_rem_tokens"):
        assert isinstance(getattr(PrefillAdder, name), property)
    names = PrefillAdder.__init__.__code__.co_names
    assert {"rem_chunk_tokens", "page_size"} <= {*names}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
