"""Greedy requests to a running server, with the log-probability of every new token."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener


@dataclass(frozen=True)
class Reply:
    """A server's reply: token ids, their log-probabilities, and reused prompt tokens."""

    ids: list[int]
    logprobs: list[float]
    cached_tokens: int = 0


@dataclass(frozen=True)
class Difference:
    """How far two replies are apart. The maximum is over the tokens that both have."""

    equal_ids: bool
    max_abs_logprob_diff: float


def open_local(request: str | Request, *, timeout: float | None = None) -> Any:
    """Open a URL of a server on this machine, past any proxy of the environment."""
    opener = build_opener(ProxyHandler({}))
    return opener.open(request, timeout=timeout)


def http_json(url: str, payload: object = None, timeout: float = 600.0) -> Any:
    """GET ``url``, or POST ``payload`` to it, and return the decoded answer."""
    data = None if payload is None else json.dumps(payload).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(url, data=data, headers=headers)
    with open_local(request, timeout=timeout) as answer:
        return json.loads(answer.read())


def greedy(
    base_url: str,
    prompts_ids: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    concurrency: int = 1,
) -> list[Reply]:
    """Generate greedily for every prompt and return the replies in prompt order.

    ``max_new_tokens`` is one number for all prompts, or one for each. Every reply has
    exactly that many tokens. Prompts start in order, at most ``concurrency`` at once.

    Raises ValueError if the numbers of prompts and of ``max_new_tokens`` differ.
    """
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * len(prompts_ids)
    else:
        limits = list(max_new_tokens)
    if len(limits) != len(prompts_ids):
        raise ValueError(
            f"max_new_tokens has {len(limits)} entries for {len(prompts_ids)} prompts"
        )
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        jobs = [
            pool.submit(_generate, base_url, ids, limit)
            for ids, limit in zip(prompts_ids, limits)
        ]
        return [job.result() for job in jobs]


def compare(a: Reply, b: Reply) -> Difference:
    """Compare two replies token by token."""
    gaps = [abs(x - y) for x, y in zip(a.logprobs, b.logprobs)]
    return Difference(a.ids == b.ids, max(gaps, default=0.0))


def _generate(base_url: str, ids: Sequence[int], max_new_tokens: int) -> Reply:
    payload = {
        "input_ids": list(ids),
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "ignore_eos": True,
        },
        "return_logprob": True,
    }
    meta = http_json(f"{base_url}/generate", payload)["meta_info"]
    pairs = meta["output_token_logprobs"]
    return Reply(
        ids=[int(entry[1]) for entry in pairs],
        logprobs=[float(entry[0]) for entry in pairs],
        cached_tokens=int(meta["cached_tokens"]),
    )
