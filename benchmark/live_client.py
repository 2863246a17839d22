"""A client of live servers: prompts of random ids, of which it asks for the next token."""

from __future__ import annotations

import http
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from sglang_dcp.demo.client import http_json, open_local

Ids = list[int]
FLUSH_TRIES = 50


class Answer(NamedTuple):
    """Seconds of one request, and how many of its tokens came from the cache."""

    seconds: float
    cached: int


Answers = list[Answer]


class Client:
    """Sends requests to one server.

    Parameters
    ----------
    url : str
        Of the server.
    vocabulary : int
        Ids are drawn below it. The same run draws the same ids.
    """

    def __init__(self, url: str, vocabulary: int) -> None:
        self.url = url
        self._draw = random.Random(0)
        self._vocabulary = vocabulary

    def ids(self, count: int) -> Ids:
        """Draw `count` ids at random."""
        return self._draw.choices(range(2, self._vocabulary), k=count)

    def pool_tokens(self) -> int:
        """Return how many tokens the whole KV pool holds."""
        return int(http_json(f"{self.url}/server_info")["max_total_num_tokens"])

    def told_bytes(self) -> int:
        """Return what attention may take by the server's estimate, 0 without DCP."""
        [state, *_] = http_json(f"{self.url}/server_info")["internal_states"]
        return int(state.get("dcp_attention_memory_bytes", 0))

    def flush(self) -> None:
        """Empty the radix cache. It waits until the last request is put away."""
        request = urllib.request.Request(f"{self.url}/flush_cache", data=b"")
        for _ in range(FLUSH_TRIES):
            try:
                open_local(request).close()
                return
            except urllib.error.HTTPError as error:
                if error.code != http.HTTPStatus.BAD_REQUEST:
                    raise
                time.sleep(0.1)
        raise RuntimeError("the cache could not be flushed")

    def together(self, prompts: Sequence[Ids]) -> Answers:
        """Ask for one token after each of `prompts`, all at once, and wait for all."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._one, prompts))

    def _one(self, ids: Ids) -> Answer:
        payload = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }
        began = time.perf_counter()
        found = http_json(f"{self.url}/generate", payload)
        seconds = time.perf_counter() - began
        return Answer(seconds, int(found["meta_info"]["cached_tokens"]))


def cache_misses(found: Iterable[tuple[str, int, int]], page: int) -> list[str]:
    """Return a line for each cached prefix that lacks more than a page.

    `found` has the layout, how many tokens came from the cache, and how many should.
    """
    return [
        f"{layout}: {cached} of {prefix} tokens came from the cache"
        for layout, cached, prefix in found
        if cached < prefix - page
    ]
