"""Replies that arrive piece by piece, and the time of a step in them."""

from __future__ import annotations

import json
import math
import time
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_dcp.demo.client import open_local
from speculation_drafts import Speculation

# Tokens of each reply that are not timed: the first steps after a prefill take longer.
WARM_TOKENS = 8
# A request whose tokens come in fewer pieces says nothing about a step.
FEWEST_GAPS = 4
STREAM_SECONDS = 600.0


class Arrival(NamedTuple):
    """When a piece of a reply came, and how many tokens the reply had then."""

    seconds: float
    tokens: int


class Reply(NamedTuple):
    """One streamed reply; `verifications` is 0 without speculation."""

    arrivals: Sequence[Arrival]
    cached: int
    verifications: int

    @property
    def tokens(self) -> int:
        return self.arrivals[-1].tokens


class Timed(NamedTuple):
    """Seconds per token of the requests of one batch: of each as a whole, and of each gap."""

    means: list[float]
    gaps: list[float]


def time_together(replies: Sequence[Reply]) -> Timed:
    """Time the tokens that came while all requests of a batch decoded.

    Raises
    ------
    RuntimeError
        If that was too short a while.
    """
    warm = [
        next(a.seconds for a in reply.arrivals if a.tokens >= WARM_TOKENS)
        for reply in replies
    ]
    begin, end = max(warm), min(reply.arrivals[-1].seconds for reply in replies)
    means, gaps = [], []
    for reply in replies:
        inside = [a for a in reply.arrivals if begin <= a.seconds <= end]
        if len(inside) <= FEWEST_GAPS:
            raise RuntimeError(
                f"{len(inside)} pieces of a reply came while all {len(replies)} requests "
                "decoded: ask for more with --output-len"
            )
        means.append(_per_token(inside[0], inside[-1]))
        gaps += [_per_token(a, b) for a, b in zip(inside, inside[1:])]
    return Timed(means, gaps)


def _per_token(a: Arrival, b: Arrival) -> float:
    # Pieces that wait for each other come as one, so a gap may have several steps.
    return (b.seconds - a.seconds) / (b.tokens - a.tokens)


def output_tokens(at_least: int, accepted: int) -> int:
    """Tokens of a reply: the prefill gives one, and each verification `accepted`."""
    return 1 + accepted * math.ceil((at_least - 1) / accepted)


def request_body(ids: Sequence[int], tokens: int) -> bytes:
    """Encode a greedy request for a stream of exactly so many tokens."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    request = {"input_ids": ids, "stream": True, "sampling_params": sampling}
    return json.dumps(request).encode()


def stream(url: str, body: bytes) -> Reply:
    """Send one request and read its reply, piece by piece.

    Raises
    ------
    RuntimeError
        If the server reports an error instead of a piece.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/generate", data=body, headers=headers)
    lines: list[tuple[float, bytes]] = []
    with open_local(request, timeout=STREAM_SECONDS) as answer:
        for line in answer:
            lines.append((time.perf_counter(), line))
    # Decoded at the end: meanwhile other replies are read.
    return reply_of(lines)


def reply_of(lines: Sequence[tuple[float, bytes]]) -> Reply:
    """Decode the lines of a stream, each with the time at which it came."""
    arrivals: list[Arrival] = []
    meta: dict[str, Any] = {}
    for seconds, line in lines:
        text = line.decode().strip().removeprefix("data:").strip()
        if not text or text == "[DONE]":
            continue
        piece = json.loads(text)
        if "meta_info" not in piece:
            raise RuntimeError(f"the server answered {text}")
        meta = piece["meta_info"]
        tokens = int(meta["completion_tokens"])
        # The last piece may only say that the reply has ended.
        if tokens > (arrivals[-1].tokens if arrivals else 0):
            arrivals.append(Arrival(seconds, tokens))
    if not arrivals:
        raise RuntimeError("a reply without a token")
    return Reply(
        arrivals, int(meta["cached_tokens"]), int(meta.get("spec_verify_ct", 0))
    )


def check(replies: Sequence[Reply], speculation: Speculation, tokens: int) -> None:
    """Raise RuntimeError if a reply is not what the simulation makes of it."""
    steps = (tokens - 1) // speculation.accepted if speculation.steps else 0
    for reply in replies:
        if (reply.tokens, reply.verifications) != (tokens, steps):
            raise RuntimeError(
                f"{reply.tokens} tokens by {reply.verifications} verifications instead of "
                f"{tokens} by {steps}"
            )
