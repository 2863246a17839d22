"""Requests to a live server with all fields, and what the server says of each."""

from __future__ import annotations

import json
import math
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from sglang_dcp.demo.client import Reply, http_json, open_local

TIMEOUT_S = 300
# Of a server that has answered, until it may be asked to give up its memory.
IDLE_S = 30


class Answer(NamedTuple):
    """A reply, and the server's own report on it (SGLang's `meta_info`)."""

    reply: Reply
    meta: dict[str, Any]


def generate(
    base_url: str, ids: Sequence[int], new_tokens: int, **fields: Any
) -> Answer:
    """Ask for `new_tokens` tokens; greedy, unless `fields` has `sampling_params`."""
    return _answer(http_json(f"{base_url}/generate", _payload(ids, new_tokens, fields)))


def generate_together(
    base_url: str, prompts: Sequence[Sequence[int]], new_tokens: Sequence[int]
) -> list[Answer]:
    """Ask greedily for all prompts in one HTTP request, so they arrive together."""
    payload = _payload(prompts, 0, {})
    payload["sampling_params"] = [_greedy(number) for number in new_tokens]
    return [_answer(one) for one in http_json(f"{base_url}/generate", payload)]


def flush_cache(base_url: str) -> None:
    """Empty the radix cache. The server waits until its last request is put away.

    Raises
    ------
    HTTPError
        It was not idle within `IDLE_S`.
    """
    request = urllib.request.Request(
        f"{base_url}/flush_cache?timeout={IDLE_S}", method="POST"
    )
    # The answer is plain text.
    open_local(request, timeout=TIMEOUT_S).close()


class Streamed:
    """A request whose tokens arrive one by one, read by a thread of its own."""

    def __init__(
        self, base_url: str, ids: Sequence[int], new_tokens: int, **fields: Any
    ) -> None:
        self._began = threading.Event()
        payload = _payload(ids, new_tokens, {**fields, "stream": True})
        pool = ThreadPoolExecutor(1)
        self.answer: Future[Answer] = pool.submit(self._read, base_url, payload)
        pool.shutdown(wait=False)

    def wait_first_token(self) -> None:
        assert self._began.wait(TIMEOUT_S), "no token came"

    def _read(self, base_url: str, payload: dict[str, Any]) -> Answer:
        request = urllib.request.Request(
            f"{base_url}/generate",
            json.dumps(payload).encode(),
            {"Content-Type": "application/json"},
        )
        last: dict[str, Any] = {}
        try:
            with open_local(request, timeout=TIMEOUT_S) as lines:
                for line in lines:
                    text = line.decode().removeprefix("data: ").strip()
                    if text and text != "[DONE]":
                        # Each event repeats what came before.
                        last = json.loads(text)
                        self._began.set()
        finally:
            self._began.set()
        return _answer(last)


def _payload(ids: Any, new_tokens: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": ids if isinstance(ids[0], (list, tuple)) else list(ids),
        "sampling_params": _greedy(new_tokens),
        "return_logprob": True,
        **fields,
    }


def _greedy(new_tokens: int) -> dict[str, Any]:
    # A tiny model never ends by itself. With `ignore_eos` SGLang would reserve room for all
    # new tokens, and no request would ever be retracted.
    return {"temperature": 0, "max_new_tokens": new_tokens}


def _answer(body: dict[str, Any]) -> Answer:
    meta = body["meta_info"]
    pairs = meta["output_token_logprobs"]
    reply = Reply(
        ids=[int(entry[1]) for entry in pairs],
        # JSON has no NaN, the server sends null.
        logprobs=[math.nan if entry[0] is None else float(entry[0]) for entry in pairs],
        cached_tokens=int(meta["cached_tokens"]),
    )
    return Answer(reply, meta)
