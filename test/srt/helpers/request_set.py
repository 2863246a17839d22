"""Mixed greedy requests, their execution on a live server, and two oracles for them.

The requests cover what context parallelism can get wrong. Lengths lie around multiples of
2, 4 and 8, and there are fewer tokens than ranks. Radix hits are whole and partial. Decode
crosses many page borders, prefill is chunked over a prefix, and batches are ragged.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_dcp.demo.client import Reply, compare, greedy

if TYPE_CHECKING:
    import torch

LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Request:
    """One greedy request; those that are not ``concurrent`` run alone, in order."""

    name: str
    ids: tuple[int, ...]
    max_new_tokens: int
    concurrent: bool = False


def build_requests(vocab_size: int = 256, seed: int = 0) -> list[Request]:
    """The request set for ids below ``vocab_size``, always in the same order."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(length))

    base = ids(131)
    requests = [
        Request("one-token", ids(1), 9),
        Request("two-tokens", ids(2), 5),
        Request("three-tokens", ids(3), 12),
        Request("aligned-64", ids(64), 8),
        Request("odd-197", ids(197), 7),
        Request("long-397", ids(397), 8),
        Request("base-131", base, 10),
        Request("repeat-131", base, 10),
        Request("prefix-131-and-58", base + ids(58), 10),
        Request("short-prefix-7-and-30", base[:7] + ids(30), 6),
        Request("long-decode", ids(21), 70),
    ]
    lengths = (5, 8, 31, 77, 130, 203, 258, 399)
    for index, length in enumerate(lengths):
        # The last one shares a prefix with requests that are already cached.
        prompt = base[:100] + ids(length - 100) if length == 399 else ids(length)
        name = f"concurrent-{length}"
        requests.append(Request(name, prompt, 6 + index, concurrent=True))
    return requests


def run_requests(base_url: str, requests: Sequence[Request]) -> list[Reply]:
    """Run the requests on a server: the sequential ones, then the concurrent at once."""
    alone = [r for r in requests if not r.concurrent]
    together = [r for r in requests if r.concurrent]
    done = dict(zip(alone, _run(base_url, alone, concurrency=1)))
    done.update(zip(together, _run(base_url, together, concurrency=len(together))))
    return [done[r] for r in requests]


def assert_equal_to_reference(
    requests: Sequence[Request],
    replies: Sequence[Reply],
    reference: Sequence[Reply],
    tolerance: float = LOGPROB_TOLERANCE,
) -> None:
    """Require equal ids and log-probabilities, and name every request that differs."""
    assert len(replies) == len(reference) == len(requests)
    faults = [
        f"{request.name} ({len(request.ids)} prompt tokens): {fault}"
        for request, got, want in zip(requests, replies, reference)
        if (fault := _first_fault(got, want, tolerance))
    ]
    if faults:
        head = f"{len(faults)} of {len(requests)} requests differ from the reference:"
        raise AssertionError("\n  ".join([head, *faults]))


def max_difference(replies: Sequence[Reply], reference: Sequence[Reply]) -> float:
    """Largest log-probability difference over all requests."""
    return max(
        compare(got, want).max_abs_logprob_diff
        for got, want in zip(replies, reference, strict=True)
    )


def hf_reference(model_dir: str | Path, requests: Sequence[Request]) -> list[Reply]:
    """Greedy replies of Hugging Face transformers, float32 on CPU, one at a time.

    Shares no attention, cache or scheduling code with SGLang.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [_hf_greedy(model, request) for request in requests]


def _run(
    base_url: str, requests: Sequence[Request], concurrency: int
) -> Sequence[Reply]:
    if not requests:
        return []
    prompts = [r.ids for r in requests]
    limits = [r.max_new_tokens for r in requests]
    return greedy(base_url, prompts, limits, concurrency)


def _first_fault(got: Reply, want: Reply, tolerance: float) -> str:
    if len(got.ids) != len(want.ids):
        return f"{len(got.ids)} new tokens, expected {len(want.ids)}"
    rows = zip(got.ids, want.ids, got.logprobs, want.logprobs)
    for position, (id_got, id_want, lp_got, lp_want) in enumerate(rows):
        # Written so that a NaN is a fault too.
        if id_got == id_want and abs(lp_got - lp_want) < tolerance:
            continue
        return (
            f"new token {position}: id {id_got}, expected {id_want}; "
            f"log-probability {lp_got:.5f}, expected {lp_want:.5f}"
        )
    return ""


def _hf_greedy(model: Any, request: Request) -> Reply:
    import torch

    ids: list[int] = []
    logprobs: list[float] = []
    step, cache = torch.tensor([request.ids]), None
    for _ in range(request.max_new_tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token, logprob = _argmax(output.logits[0, -1])
        ids.append(token)
        logprobs.append(logprob)
        step = torch.tensor([[token]])
    return Reply(ids, logprobs)


def _argmax(logits: "torch.Tensor") -> tuple[int, float]:
    scores = logits.float().log_softmax(-1)
    token = int(scores.argmax())
    return token, float(scores[token])
