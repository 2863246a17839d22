"""The hook of SGLang's scheduler where it takes the next chunk of a prompt."""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable

from sglang_dcp.context import find_context
from sglang_dcp.releases.api import sglang_api

logger = logging.getLogger(__name__)


def add_chunked_req(original: Callable[[Any, Any], Any], adder: Any, req: Any) -> Any:
    """Hook: `PrefillAdder.add_chunked_req`; with DCP on, a chunk waits for room.

    The pool may be full of requests that decode, with nothing to evict. SGLang takes the
    chunk all the same. Its allocation then fails, and ends all schedulers
    (sgl-project/sglang#30743). Here the request is returned as it is, and decode goes on.
    Requests that end or are retracted make room. All ranks count the same tokens, so all of
    them wait.
    """
    if find_context() is None or _has_room(adder, req):
        return original(adder, req)
    _say_once()
    return req


def _has_room(adder: Any, req: Any) -> bool:
    # What running requests may need is an estimate, and so a fraction of a token.
    if int(adder.rem_total_tokens) > 0:
        # SGLang cuts the chunk to that. It is so whenever no request runs.
        return True
    left = len(req.full_untruncated_fill_ids) - sglang_api().cached_tokens(req)
    chunk = min(left, adder.rem_chunk_tokens)
    # One page more, as SGLang reserves it: a chunk need not start with a page.
    pages = -(-chunk // adder.page_size) + 1
    return bool(pages * adder.page_size <= adder.cur_rem_tokens)


@functools.cache
def _say_once() -> None:
    logger.info("DCP: a chunk of a prompt waits, because the KV pool is full")
