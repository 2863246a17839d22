"""Scenarios from public reports of sequence-sharded KV caches, on live CPU servers in fp32.

The numbers are those of the table in docs/correctness.md, which names the reports. Only
here are seen a GGUF checkpoint, prefix hits at the edge of a logical page, and a pool that
is no whole number of pages. Retraction, preemption and a chunk that waits are certain
here. Further cases are replicas, sampling by 64 users, and embeddings. The oracle is
Hugging Face transformers.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import request_set
from helpers.generate import Answer, Streamed, generate, generate_together
from helpers.gguf_checkpoint import write_gguf
from helpers.request_set import LOGPROB_TOLERANCE, Request
from helpers.servers import server
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.long]

DCP = "--tp 2 --dcp-size 2 --enable-cache-report"
CHECK_EVERY_BATCH = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
# Of a server in float16. A wrong head moves a log-probability by whole units.
HALF_TOLERANCE = 0.1
# Printable characters: the tiny models give no other a score.
FIRST_ID, LAST_ID = 32, 126


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a kind, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(root / kind, kind)


def draw_ids(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randint(FIRST_ID, LAST_ID) for _ in range(length))


def make_requests(seed: int, *sizes: tuple[int, int]) -> list[Request]:
    """Requests of so many prompt tokens and new tokens."""
    draw = random.Random(seed)
    return [Request(f"{n} + {new}", draw_ids(draw, n), new) for n, new in sizes]


def assert_equal_to_transformers(
    model: Path,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    tolerance: float = LOGPROB_TOLERANCE,
) -> None:
    oracle = request_set.hf_reference(model, requests)
    replies = [answer.reply for answer in answers]
    request_set.assert_equal_to_reference(requests, replies, oracle, tolerance)


def send(dcp: ServerProcess, requests: Sequence[Request]) -> list[Answer]:
    """All requests at once."""
    prompts = [request.ids for request in requests]
    sizes = [request.max_new_tokens for request in requests]
    return generate_together(dcp.base_url, prompts, sizes)


def assert_no_leak(dcp: ServerProcess) -> None:
    """Nothing holds a page any more. SGLang's own check at idle ends a server that leaks."""
    assert generate(dcp.base_url, (65,), 1).reply.ids
    assert dcp.returncode is None
    assert "leak" not in dcp.log_path.read_text(errors="replace").lower()


def test_1_gguf(models: Callable[[str], Path]) -> None:
    """SGLang cuts GGUF rows of K and V by rank, and two ranks hold the same heads here."""
    model = models("llama-2kv")
    flags = f"{DCP} --tokenizer-path {model} --max-total-tokens 1024 --dtype float16"
    requests = make_requests(1, (1, 5), (33, 9), (150, 12))
    with server(write_gguf(model), flags) as dcp:
        answers = send(dcp, requests)
    assert_equal_to_transformers(model, requests, answers, HALF_TOLERANCE)


def test_5_each_replica_answers_right(models: Callable[[str], Path]) -> None:
    model = models("llama-8kv")
    requests = make_requests(5, (2, 4), (65, 8), (199, 12))
    with server(model, f"{DCP} --dp-size 2 --max-total-tokens 2048") as replicas:
        answers = {
            rank: [
                generate(
                    replicas.base_url, r.ids, r.max_new_tokens, routed_dp_rank=rank
                )
                for r in requests
            ]
            for rank in (0, 1)
        }
    for rank, found in answers.items():
        assert {answer.meta["dp_rank"] for answer in found} == {rank}
        # Each replica has a radix tree of its own.
        assert [answer.reply.cached_tokens for answer in found] == [0, 0, 0]
        assert_equal_to_transformers(model, requests, found)


# Of one rank, and no whole number of logical pages of 16 x 2: 320 are used.
ODD_POOL, PAGE = 333, 16
LOGICAL_PAGE = 2 * PAGE
POOL = 640


@pytest.fixture(scope="module")
def paged(models: Callable[[str], Path]) -> Iterator[tuple[Path, ServerProcess]]:
    model = models("qwen2")
    flags = f"{DCP} --page-size {PAGE} --max-total-tokens {ODD_POOL}"
    with server(model, flags, CHECK_EVERY_BATCH) as dcp:
        yield model, dcp


def test_12_a_prefix_hit_is_whole_logical_pages(
    paged: tuple[Path, ServerProcess],
) -> None:
    model, dcp = paged
    [below] = make_requests(12, (LOGICAL_PAGE - 1, 4))
    [above] = make_requests(13, (LOGICAL_PAGE + 1, 4))
    requests = [below, below, above, above]
    answers = [generate(dcp.base_url, r.ids, r.max_new_tokens) for r in requests]
    cached = [answer.reply.cached_tokens for answer in answers]
    assert cached == [0, 0, 0, LOGICAL_PAGE]
    assert_equal_to_transformers(model, requests, answers)


def test_21_a_pool_of_no_whole_pages_is_filled_to_its_end(
    paged: tuple[Path, ServerProcess],
) -> None:
    model, dcp = paged
    info = http_json(f"{dcp.base_url}/server_info")
    assert info["max_total_num_tokens"] == POOL
    # Two that take half of the pool each, to the last slot, and the longest alone.
    half = POOL // 2
    two = make_requests(21, (half - 20, 20), (half - 19, 19))
    one = make_requests(22, (POOL - 2 * LOGICAL_PAGE - 1, 30))
    answers = send(dcp, two) + send(dcp, one)
    assert_equal_to_transformers(model, [*two, *one], answers)
    assert_no_leak(dcp)


def test_17_sampling_by_64_users(paged: tuple[Path, ServerProcess]) -> None:
    """More than three times the pool. Each token's log-probability is scored again."""
    model, dcp = paged
    draw = random.Random(17)
    prompts = [draw_ids(draw, 5 + number % 40) for number in range(64)]
    sampling = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    sizes = [6 + number % 9 for number in range(64)]
    payload = {
        "input_ids": prompts,
        "sampling_params": [{**sampling, "max_new_tokens": n} for n in sizes],
        "return_logprob": True,
    }
    bodies = http_json(f"{dcp.base_url}/generate", payload)
    pairs = [body["meta_info"]["output_token_logprobs"] for body in bodies]
    assert [len(one) for one in pairs] == sizes
    oracle = load_oracle(model)
    for prompt, one in zip(prompts, pairs):
        scores = score_again(oracle, prompt, [int(entry[1]) for entry in one])
        gaps = [abs(entry[0] - score) for entry, score in zip(one, scores)]
        assert max(gaps) < LOGPROB_TOLERANCE
    assert_no_leak(dcp)


def score_again(oracle: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids` after `prompt` by transformers, in float32."""
    import torch

    whole = torch.tensor([[*prompt, *ids]])
    with torch.inference_mode():
        logits = oracle(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(ids)[:, None]
    found: list[float] = logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
    return found


def load_oracle(model: Path, auto: str = "AutoModelForCausalLM") -> Any:
    import torch
    import transformers

    kind = getattr(transformers, auto)
    return kind.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def crowded(models: Callable[[str], Path]) -> Iterator[tuple[Path, ServerProcess]]:
    """A pool of 600 tokens, and a scheduler that admits more than fits."""
    model = models("llama-2kv")
    flags = f"{DCP} --max-total-tokens 300 --schedule-conservativeness 0.3"
    flags += " --enable-priority-scheduling --max-running-requests 3"
    flags += " --dcp-replicate-q-proj"
    with server(model, flags, CHECK_EVERY_BATCH) as dcp:
        yield model, dcp


def test_14_retracted_requests(crowded: tuple[Path, ServerProcess]) -> None:
    model, dcp = crowded
    one_after_another = make_requests(14, (300, 290), (250, 300))
    # Admitted one by one, by a small reserve for those that run; they need 1050 tokens.
    together = make_requests(15, (100, 290), (100, 300), (60, 200))
    requests = [*one_after_another, *together]
    answers = send(dcp, one_after_another) + send(dcp, together)
    assert sum(answer.meta["num_retractions"] for answer in answers) > 0
    assert "Retract requests" in dcp.log_path.read_text(errors="replace")
    assert_equal_to_transformers(model, requests, answers)
    assert_no_leak(dcp)


def test_17_preempted_requests(crowded: tuple[Path, ServerProcess]) -> None:
    """No place is free, so the urgent one is first only if it takes another's."""
    model, dcp = crowded
    *patient, urgent = make_requests(17, (100, 200), (100, 201), (100, 202), (60, 12))
    slow = [
        Streamed(dcp.base_url, r.ids, r.max_new_tokens, priority=1) for r in patient
    ]
    for streamed in slow:
        streamed.wait_first_token()
    fast = generate(dcp.base_url, urgent.ids, urgent.max_new_tokens, priority=100)
    assert not any(streamed.answer.done() for streamed in slow)
    answers = [*(streamed.answer.result() for streamed in slow), fast]
    assert_equal_to_transformers(model, [*patient, urgent], answers)
    assert_no_leak(dcp)


def test_16_embeddings(models: Callable[[str], Path]) -> None:
    import torch

    model = models("qwen3")
    draw = random.Random(16)
    prompts = [list(draw_ids(draw, n)) for n in (1, 2, 3, 63, 64, 65, 130, 200)]
    flags = f"{DCP} --is-embedding --chunked-prefill-size 64 --max-total-tokens 1024"
    with server(model, flags) as dcp:
        # Together, and again one by one: then each prefix is cached.
        found = embed(dcp, prompts)
        found += [embed(dcp, [prompt])[0] for prompt in prompts]
    oracle = load_oracle(model, "AutoModel")
    for prompt, vector in zip(prompts * 2, found, strict=True):
        with torch.inference_mode():
            hidden = oracle(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        wanted = torch.nn.functional.normalize(hidden, dim=0)
        assert torch.allclose(torch.tensor(vector), wanted, rtol=0, atol=1e-5)


def embed(dcp: ServerProcess, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    answer = http_json(
        f"{dcp.base_url}/v1/embeddings", {"input": prompts, "model": "-"}
    )
    return [entry["embedding"] for entry in answer["data"]]


def test_20_a_shared_prefix_with_short_tails(models: Callable[[str], Path]) -> None:
    """Eight tails of 3 to 13 tokens at once, behind a prefix that is cached."""
    model = models("mla-v3")
    draw = random.Random(20)
    prefix = draw_ids(draw, 500)
    tails = [draw_ids(draw, length) for length in (3, 4, 5, 6, 7, 9, 11, 13)]
    requests = [Request("prefix", prefix, 2)]
    requests += [Request(f"tail of {len(t)}", prefix + t, 6) for t in tails]
    env = {"SGLANG_MAX_KV_CHUNK_CAPACITY": "128"}
    flags = f"{DCP} --chunked-prefill-size 256 --max-total-tokens 4096"
    with server(model, flags, env) as dcp:
        answers = send(dcp, requests[:1]) + send(dcp, requests[1:])
    assert all(a.reply.cached_tokens >= len(prefix) for a in answers[1:])
    assert_equal_to_transformers(model, requests, answers)


@pytest.mark.parametrize(("page_size", "length"), [(1, 300), (4, 200)])
def test_22_a_chunk_of_a_prompt_in_a_full_pool(
    models: Callable[[str], Path], page_size: int, length: int
) -> None:
    """12 requests decode beside the chunks of a prompt, until no token is left.

    A request that ignores the end of a text has all its tokens reserved, and one that asks
    for log-probabilities is not mixed with chunks.
    """
    model = models("llama-2kv")
    requests = make_requests(22, *[(8, 120)] * 12, (length, 4))
    flags = f"{DCP} --page-size {page_size} --max-total-tokens 256"
    flags += " --enable-mixed-chunk --chunked-prefill-size 32"
    flags += " --schedule-conservativeness 0.05"
    payload = {
        "input_ids": [request.ids for request in requests],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": request.max_new_tokens}
            for request in requests
        ],
    }
    with server(model, flags) as dcp:
        bodies = http_json(f"{dcp.base_url}/generate", payload)
        assert "a chunk of a prompt waits" in dcp.log_path.read_text(errors="replace")
        assert_no_leak(dcp)
    oracle = load_oracle(model)
    for request, body in zip(requests, bodies, strict=True):
        assert len(body["output_ids"]) == request.max_new_tokens
        assert_greedy(oracle, request.ids, body["output_ids"])


def assert_greedy(oracle: Any, prompt: Sequence[int], ids: Sequence[int]) -> None:
    """Each token is the best one by transformers, or as good as the best."""
    import torch

    whole = torch.tensor([[*prompt, *ids]])
    with torch.inference_mode():
        logits = oracle(input_ids=whole).logits[0, len(prompt) - 1 : -1]
    best = logits.log_softmax(-1).max(-1).values.tolist()
    gaps = [a - b for a, b in zip(best, score_again(oracle, prompt, ids))]
    assert max(gaps) < LOGPROB_TOLERANCE


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
