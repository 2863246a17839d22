"""Teacher-forced requests: every server sees the same history, so every token counts.

Greedy replies part at the first near tie, and what comes after cannot be compared. Here
a plugin, SGLang's own mechanism, lets the sampler return a token that depends on its
position alone, with the log-probability that the model gave to it. The model runs as
ever: prefill, decode in CUDA graphs, overlap scheduler, radix cache.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, Optional

from sglang_dcp.demo.client import Reply, http_json

# What the longest prompt and its new tokens need; the checkpoints say less.
CONTEXT_LENGTH = 40960
CONTEXT_FLAGS = (
    f'--json-model-override-args {{"max_position_embeddings":{CONTEXT_LENGTH}}}'
)


def forced_token(position: Any) -> Any:
    """The id at `position`, an int or a tensor; printable, as only those have logits."""
    return 32 + (31 * position + 7) % 95


# For servers that reply with their own tokens.
NO_PLUGIN = "def load(): ..."
PLUGIN = f"""
from __future__ import annotations

{inspect.getsource(forced_token)}

def forward(
    sample, sampler, logits_output, sampling_info, return_logprob, top_logprobs_nums,
    token_ids_logprobs, positions,
):
    scores = logits_output.next_token_logits.float().log_softmax(-1)
    chosen = sample(
        sampler, logits_output, sampling_info, return_logprob, top_logprobs_nums,
        token_ids_logprobs, positions,
    )
    forced = forced_token(positions.long() + 1)
    if return_logprob:
        rows = scores.gather(-1, forced[:, None])
        logits_output.next_token_logprobs = rows.squeeze(-1)
    return forced.to(chosen.dtype)


def load():
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.layers.sampler.Sampler.forward", forward, HookType.AROUND
    )
"""


@dataclass(frozen=True)
class Prompt:
    """One request; its first `shared` tokens were served before, so they are cached.

    `adapter` is the name of a LoRA adapter, or None.
    """

    name: str
    ids: tuple[int, ...]
    new_tokens: int
    shared: int = 0
    adapter: Optional[str] = None


# Sent at once; the next wave follows when all replies are there.
Wave = Sequence[Prompt]


def build_waves(seed: int = 0) -> list[Wave]:
    """Requests of 1 to 32K tokens, alone and 64 at once, with prefix hits in both."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(length))

    base = ids(1500)
    alone = [
        *(Prompt(f"alone-{n}", ids(n), 8 + n % 7) for n in (1, 2, 3, 64, 197, 1023)),
        Prompt("base-1500", base, 12),
        Prompt("repeat-1500", base, 12, shared=1500),
        Prompt("prefix-1500-and-700", base + ids(700), 12, shared=1500),
        Prompt("prefix-1311-and-5", base[:1311] + ids(5), 12, shared=1311),
        Prompt("long-decode", ids(21), 70),
    ]
    # Long ones first and with more to say: with mixed chunks they decode while the
    # others are prefilled, and must not end before all 64 decode together.
    together = [
        Prompt(f"together-{n}", ids(n), 128) for n in (32768, 16384, 8191, 4097)
    ]
    for n in (1500, 1999, 2750):
        shared = base[: n // 2]
        prompt = shared + ids(n - len(shared))
        together.append(Prompt(f"together-prefix-{n}", prompt, 48, len(shared)))
    while len(together) < 64:
        # Different ends: the batch shrinks through the sizes that graphs are padded to.
        n, end = len(together), 24 + 5 * len(together) % 17
        length = 1 + (n * n) % 521
        together.append(Prompt(f"together-{n}-of-{length}", ids(length), end))
    return [*([prompt] for prompt in alone), together]


def with_adapters(waves: Sequence[Wave], names: Sequence[str]) -> list[Wave]:
    """`waves` with adapters in turn and with none, and before them one prompt with each.

    The cache keeps prefixes of each adapter by themselves. So prompts that share one have
    the first adapter.
    """
    draw = random.Random(1)
    ids = tuple(draw.randrange(256) for _ in range(90))
    choices: list[Optional[str]] = [None, *names]
    found: list[Wave] = [
        [Prompt(f"same-{name}", ids, 16, adapter=name) for name in choices]
    ]
    turn = itertools.cycle(choices)
    for wave in waves:
        found.append([replace(prompt, adapter=next(turn)) for prompt in wave])
    return [[_family_in_one(prompt, names[0]) for prompt in wave] for wave in found]


def _family_in_one(prompt: Prompt, name: str) -> Prompt:
    shares = prompt.shared or prompt.name.startswith("base-")
    return replace(prompt, adapter=name) if shares else prompt


@dataclass(frozen=True)
class CountedReply(Reply):
    """A reply, and how many verifications gave its tokens: 0 without speculation.

    SGLang counts those of each request until it is finished. So the count does not depend
    on the overlap scheduler, which verifies once more, nor on how requests were batched.
    """

    verifications: int = 0


def ask(base_url: str, waves: Sequence[Wave], **fields: Any) -> dict[str, CountedReply]:
    """The replies of a server, by prompt name; `fields` are added to each HTTP request."""
    replies: dict[str, CountedReply] = {}
    for wave in waves:
        replies.update(zip((p.name for p in wave), _ask_wave(base_url, wave, fields)))
    return replies


def _ask_wave(
    base_url: str, wave: Wave, fields: Mapping[str, Any]
) -> Iterator[CountedReply]:
    # One HTTP request: the batch forms whatever the speed of this client's threads.
    payload = {
        "input_ids": [list(prompt.ids) for prompt in wave],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": p.new_tokens, "ignore_eos": True}
            for p in wave
        ],
        "return_logprob": True,
        **fields,
    }
    if any(prompt.adapter for prompt in wave):
        payload["lora_path"] = [prompt.adapter for prompt in wave]
    for answer in http_json(f"{base_url}/generate", payload):
        meta = answer["meta_info"]
        pairs = meta["output_token_logprobs"]
        yield CountedReply(
            ids=[int(entry[1]) for entry in pairs],
            # JSON has no NaN, the server sends null.
            logprobs=[math.nan if e[0] is None else float(e[0]) for e in pairs],
            cached_tokens=int(meta["cached_tokens"]),
            verifications=int(meta.get("spec_verify_ct", 0)),
        )


def check_replies(
    waves: Sequence[Wave],
    replies: Mapping[str, Reply],
    page_size: int,
    *,
    eagle: bool = False,
) -> None:
    """Every reply is the forced one, whole, and every shared prefix came from the cache.

    `page_size` is the server's: it caches whole pages. A server with an `eagle` draft has
    pairs of neighbours for keys of its cache, so a prefix has one key less than tokens.
    """
    for prompt in (prompt for wave in waves for prompt in wave):
        reply, start = replies[prompt.name], len(prompt.ids)
        positions = range(start, start + prompt.new_tokens)
        assert reply.ids == [forced_token(p) for p in positions], prompt.name
        if prompt.shared:
            least = (prompt.shared - 1 - eagle) // page_size * page_size
            assert reply.cached_tokens >= least > 0, prompt.name


@dataclass(frozen=True)
class Distance:
    """|d log-probability| of two servers: of a token, and of a request's mean."""

    mean: float
    worst: float
    worst_request: float
    request: str
    tokens: int

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.3g} max {self.worst:.3g} "
            f"worst request {self.worst_request:.3g} ({self.request})"
        )


def distance(got: Mapping[str, Reply], want: Mapping[str, Reply]) -> Distance:
    """Over every token of every reply; a NaN anywhere makes the mean NaN."""
    gaps = {
        name: [abs(a - b) for a, b in zip(got[name].logprobs, reply.logprobs)]
        for name, reply in want.items()
    }
    requests = {name: mean(of_request) for name, of_request in gaps.items()}
    tokens = [gap for of_request in gaps.values() for gap in of_request]
    name = max(requests, key=lambda name: requests[name])
    return Distance(mean(tokens), max(tokens), requests[name], name, len(tokens))
