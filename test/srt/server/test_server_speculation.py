"""Live CPU servers that speculate on a sharded KV cache: DCP = tp 1 without speculation.

Only here do SGLang's speculative workers meet a sharded pool: slots of drafts beyond the
committed tokens, accepted and rejected ones, what the radix tree gets of them, and pages
that are freed and used again. NGRAM has no draft model, and a known corpus takes the place
of its own: all, none or some of its drafts are right. STANDALONE drafts with a model: if
that is the target itself, every draft must be accepted.

A plugin opens these servers, which DCP refuses otherwise, and brings kernels for a CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import request_set
from helpers.generate import Answer, generate, generate_together
from helpers.request_set import Request
from helpers.servers import server
from helpers.speculation import knowing, speculating, write_sequences
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.tiny_model import make_tiny_model
from sglang_dcp.releases.installed import in_range, sglang_version

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        not in_range(sglang_version(), "0.5.23", None),
        reason="DCP serves the speculation of SGLang 0.5.23 on",
    ),
]

CHECK_EVERY_BATCH = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
WIDTH = 4
_CHAIN = f"--speculative-num-steps {WIDTH - 1} --speculative-num-draft-tokens {WIDTH}"
NGRAM = f"--speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1 {_CHAIN} "
STANDALONE = (
    f"--speculative-algorithm STANDALONE --speculative-eagle-topk 1 {_CHAIN} "
    "--speculative-draft-model-path {draft} "
)


@dataclass(frozen=True)
class Case:
    """`right` says which drafts of NGRAM are right; `draft` is a draft model's seed."""

    kind: str
    flags: str
    right: str = ""
    draft: int | None = None
    max_total_tokens: int = 4096

    @property
    def algorithm(self) -> str:
        return "STANDALONE" if self.draft is not None else "NGRAM"


A2A2 = "--tp 2 --dcp-size 2 --dcp-comm-backend a2a"
CASES = {
    "ngram-some-llama-tp2-a2a-page4": Case(
        "llama-2kv", f"{A2A2} --page-size 4 --chunked-prefill-size 64", "some"
    ),
    "ngram-all-llama-tp2-ag_rs-replicated": Case(
        "llama-8kv", "--tp 2 --dcp-size 2 --dcp-replicate-q-proj", "all"
    ),
    "ngram-none-mla-tp2-a2a": Case("mla-dense", A2A2, "none"),
    # Requests are longer than one rank's pool, and what the tree holds is evicted.
    "ngram-some-mla-v3-tp2-replicated-page4-eviction": Case(
        "mla-v3",
        f"{A2A2} --dcp-replicate-q-proj --page-size 4 --chunked-prefill-size 64",
        "some",
        max_total_tokens=360,
    ),
    "ngram-some-qwen3-tp4-attn2": Case("qwen3", "--tp 4 --attn-tp-size 2", "some"),
    "standalone-itself-llama-tp2-a2a-page4": Case(
        "llama-2kv", f"{A2A2} --page-size 4 --chunked-prefill-size 64", draft=0
    ),
    "standalone-itself-mla-tp2-replicated": Case(
        "mla-dense", f"{A2A2} --dcp-replicate-q-proj", draft=0
    ),
    "standalone-random-llama-tp4-attn2": Case(
        "llama-8kv", "--tp 4 --attn-tp-size 2", draft=1
    ),
}
SHORT = "ngram-some-llama-tp2-a2a-page4"


def _params() -> list[Any]:
    """All but one are left to `make test`: each starts a server in new interpreters."""
    return [
        pytest.param(case, id=name, marks=[pytest.mark.long] * (name != SHORT))
        for name, case in CASES.items()
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoint of a kind and a seed, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind, seed=0: make_tiny_model(
        root / f"{kind}-{seed}", kind, seed=seed
    )


def environment(
    case: Case, folder: Path, requests: Sequence[Request], replies: Sequence[Reply]
) -> Mapping[str, str]:
    """What the server of a case needs, with a corpus that knows the right replies."""
    env = {**speculating(folder, case.algorithm), **CHECK_EVERY_BATCH}
    if not case.right:
        return env
    known = [[*request.ids, *reply.ids] for request, reply in zip(requests, replies)]
    file = write_sequences(folder / "known.json", known)
    return {**env, **knowing(case.right, file)}


@pytest.mark.parametrize("case", _params())
def test_equal_to_tp1(case: Case, model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers takes the place of tp 1: `test_server_equality` compares the two."""
    target = model(case.kind)
    requests = request_set.build_requests()
    wanted = request_set.hf_reference(target, requests)
    draft = model(case.kind, case.draft) if case.draft is not None else target
    algorithm = STANDALONE.format(draft=draft) if case.draft is not None else NGRAM
    flags = f"{case.flags} {algorithm} --max-total-tokens {case.max_total_tokens}"
    env = environment(case, tmp_path, requests, wanted)
    with server(target, flags, env, fresh=True) as dcp:
        replies = request_set.run_requests(dcp.base_url, requests)
        # Served before, so its prompt and a part of its reply come from the radix tree.
        again = _ask_again(dcp.base_url, requests)
        together = generate_together(
            dcp.base_url,
            [r.ids for r in requests if r.concurrent],
            [r.max_new_tokens for r in requests if r.concurrent],
        )
        info = http_json(f"{dcp.base_url}/server_info")
        log = dcp.log_path.read_text(errors="replace")
    request_set.assert_equal_to_reference(requests, replies, wanted)
    by_name = {request.name: reply for request, reply in zip(requests, wanted)}
    of_repeated = [by_name[name] for name in _REPEATED]
    repeated = [request for request in requests if request.name in _REPEATED]
    request_set.assert_equal_to_reference(
        repeated, [answer.reply for answer in again], of_repeated
    )
    for request, answer in zip((r for r in requests if r.concurrent), together):
        assert answer.reply.ids == by_name[request.name].ids, request.name
    assert "leak" not in log.lower()
    pages = info["page_size"]
    assert info["max_total_num_tokens"] == case.max_total_tokens // pages * pages * 2
    _check_acceptance(case, [*again, *together])
    print(f"max |d logprob| {request_set.max_difference(replies, wanted):.2e}")


_REPEATED = ("base-131", "long-decode")


def _ask_again(base_url: str, requests: Sequence[Request]) -> list[Answer]:
    named = {request.name: request for request in requests}
    return [
        generate(base_url, named[name].ids, named[name].max_new_tokens)
        for name in _REPEATED
    ]


def _check_acceptance(case: Case, answers: Sequence[Answer]) -> None:
    """By SGLang's own count of verifications: right drafts save them, wrong ones do not.

    The first token of a reply comes from the prefill. A verification gives at least one.
    """
    for answer in answers:
        tokens = len(answer.reply.ids) - 1
        verified = answer.meta["spec_verify_ct"]
        all_right = math.ceil(tokens / WIDTH)
        if case.right == "all" or case.draft == 0:
            assert verified == all_right, answer.meta
        elif case.right == "none":
            # A random draft is right once in 256 tries.
            assert verified >= 0.9 * tokens, answer.meta
        else:
            assert all_right <= verified <= tokens, answer.meta
    if case.right == "some":
        total = sum(len(answer.reply.ids) - 1 for answer in answers)
        verified = sum(answer.meta["spec_verify_ct"] for answer in answers)
        assert total / WIDTH < verified < total


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
