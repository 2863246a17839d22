"""Live CPU servers that speculate on a sharded KV cache: DCP = tp 1 without speculation.

Only here do SGLang's speculative workers meet a sharded pool. Drafts take slots beyond the
committed tokens, and are accepted or rejected. The radix tree gets some of these slots, and
pages are freed and used again. NGRAM has no draft model, and a known corpus takes the place
of its own: all, none or some of its drafts are right. STANDALONE drafts with a model, and
as many drafts must be accepted as by transformers. Heads of EAGLE and MTP are random, so
that most of their drafts are wrong, or compute what the target computes.

A plugin opens these servers, which DCP refuses otherwise, and brings kernels for a CPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import request_set
from helpers.draft_extension_door import replays_in
from helpers.draft_models import (
    make_eagle,
    make_eagle3,
    make_shallow_deepseek,
    make_shallow_llama,
    make_with_mtp,
)
from helpers.draft_oracle import DraftOracle
from helpers.generate import Answer, generate, generate_together
from helpers.needs_sglang import needs_sglang
from helpers.request_set import Request
from helpers.servers import server
from helpers.speculation import (
    knowing,
    known_verifications,
    speculating,
    write_sequences,
)
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.server,
    needs_sglang("0.5.23", "DCP serves the speculation of SGLang 0.5.23 on"),
]

CHECK_EVERY_BATCH = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
WIDTH = 4
_CHAIN = f"--speculative-num-steps {WIDTH - 1} --speculative-num-draft-tokens {WIDTH}"
NGRAM = f"--speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1 {_CHAIN} "
WITH_DRAFT = (
    f"--speculative-eagle-topk 1 {_CHAIN} --speculative-algorithm {{algorithm}} "
    "--speculative-draft-model-path {path} "
)
# Algorithm by what drafts: the target itself, another model, or a head.
ALGORITHMS = {
    "itself": "STANDALONE",
    "stranger": "STANDALONE",
    "eagle": "EAGLE",
    "eagle3": "EAGLE3",
    "eagle3-right": "EAGLE3",
    "mtp": "NEXTN",
    "mtp-right": "NEXTN",
}


@dataclass(frozen=True)
class Case:
    """`right` says which drafts of NGRAM are right; `draft` what else makes them.

    Without either, SGLang's own corpus drafts. A draft's extensions can be `replayed`, as on
    GPUs.
    """

    kind: str
    flags: str
    right: str = ""
    draft: str = ""
    max_total_tokens: int = 4096
    replayed: bool = False

    @property
    def algorithm(self) -> str:
        return ALGORITHMS[self.draft] if self.draft else "NGRAM"


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
    # SGLang's own corpus, which knows what was said before.
    "ngram-own-llama-tp2-page4": Case("llama-2kv", f"{A2A2} --page-size 4"),
    "ngram-some-qwen3-tp4-attn2": Case("qwen3", "--tp 4 --attn-tp-size 2", "some"),
    "standalone-itself-llama-tp2-a2a-page4": Case(
        "llama-2kv", f"{A2A2} --page-size 4 --chunked-prefill-size 64", draft="itself"
    ),
    "standalone-itself-mla-tp2-replicated": Case(
        "mla-dense", f"{A2A2} --dcp-replicate-q-proj", draft="itself"
    ),
    "standalone-stranger-llama-tp4-attn2": Case(
        "llama-8kv", "--tp 4 --attn-tp-size 2", draft="stranger"
    ),
    "eagle-llama-tp2": Case("llama-2kv", f"{A2A2} --page-size 4", draft="eagle"),
    "eagle3-llama-tp2-replicated": Case(
        "llama-2kv", f"{A2A2} --dcp-replicate-q-proj", draft="eagle3"
    ),
    "eagle3-right-llama-tp2-page4": Case(
        "llama-2kv", f"{A2A2} --page-size 4", draft="eagle3-right"
    ),
    "eagle3-right-llama-tp2-page4-replayed": Case(
        "llama-2kv", f"{A2A2} --page-size 4", draft="eagle3-right", replayed=True
    ),
    "standalone-stranger-llama-tp4-attn2-replayed": Case(
        "llama-8kv", "--tp 4 --attn-tp-size 2", draft="stranger", replayed=True
    ),
    "mtp-mla-v3-tp2-page4": Case("mla-v3", f"{A2A2} --page-size 4", draft="mtp"),
    "mtp-right-mla-v3-tp2-replicated": Case(
        "mla-v3", f"{A2A2} --dcp-replicate-q-proj", draft="mtp-right"
    ),
    "mtp-right-mla-v3-tp2-replicated-replayed": Case(
        "mla-v3",
        f"{A2A2} --dcp-replicate-q-proj",
        draft="mtp-right",
        replayed=True,
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


def target_of(case: Case, model: Callable[..., Path], folder: Path) -> Path:
    target = model(case.kind)
    if case.draft == "eagle3-right":
        return make_shallow_llama(folder, target)
    if case.draft == "mtp-right":
        return make_shallow_deepseek(folder, target)
    return target


def draft_of(
    case: Case, target: Path, model: Callable[..., Path], folder: Path
) -> Path:
    """The checkpoint that drafts: with MTP that of a target, which has the layer, too."""
    if case.draft == "stranger":
        return model(case.kind, 1)
    if case.draft == "eagle":
        return make_eagle(folder, target)
    right = case.draft.endswith("-right")
    if case.algorithm == "EAGLE3":
        return make_eagle3(folder, target, right=right)
    if case.algorithm == "NEXTN":
        return make_with_mtp(folder, target, right=right)
    return target


def environment(
    case: Case, folder: Path, requests: Sequence[Request], replies: Sequence[Reply]
) -> Mapping[str, str]:
    """What the server of a case needs, with a corpus that knows the right replies."""
    name = {"NEXTN": "EAGLE"}.get(case.algorithm, case.algorithm)
    door = "draft_extension_door" if case.replayed else None
    env = {**speculating(folder, name, door=door), **CHECK_EVERY_BATCH}
    if not case.right:
        return env
    known = [[*request.ids, *reply.ids] for request, reply in zip(requests, replies)]
    file = write_sequences(folder / "known.json", known)
    return {**env, **knowing(case.right, file)}


class Served(NamedTuple):
    """Replies to the request set, and answers to some of it once more."""

    replies: list[Reply]
    again: dict[Request, Answer]
    info: dict[str, Any]
    log: str


_REPEATED = ("base-131", "long-decode")


def serve(
    target: Path, flags: str, env: Mapping[str, str], requests: Sequence[Request]
) -> Served:
    """Served before, prompts come from the radix tree, with what was accepted behind."""
    repeated = [request for request in requests if request.name in _REPEATED]
    together = [request for request in requests if request.concurrent]
    with server(target, flags, env, fresh=True) as dcp:
        replies = request_set.run_requests(dcp.base_url, requests)
        again = {
            request: generate(dcp.base_url, request.ids, request.max_new_tokens)
            for request in repeated
        }
        answers = generate_together(
            dcp.base_url,
            [request.ids for request in together],
            [request.max_new_tokens for request in together],
        )
        again.update(zip(together, answers))
        info = http_json(f"{dcp.base_url}/server_info")
        log = dcp.log_path.read_text(errors="replace")
    return Served(replies, again, info, log)


@pytest.mark.parametrize("case", _params())
def test_equal_to_tp1(case: Case, model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers takes the place of tp 1: `test_server_equality` compares the two."""
    target = model_of_transformers = target_of(case, model, tmp_path / "target")
    requests = request_set.build_requests()
    wanted = request_set.hf_reference(target, requests)
    draft, speculation = target, NGRAM
    if case.draft:
        draft = draft_of(case, target, model, tmp_path / "draft")
        speculation = WITH_DRAFT.format(algorithm=case.algorithm, path=draft)
    if case.algorithm == "NEXTN":
        target = draft
    flags = f"{case.flags} {speculation} --max-total-tokens {case.max_total_tokens}"
    env = environment(case, tmp_path, requests, wanted)
    served = serve(target, flags, env, requests)
    request_set.assert_equal_to_reference(requests, served.replies, wanted)
    by_request = dict(zip(requests, wanted))
    request_set.assert_equal_to_reference(
        [*served.again],
        [answer.reply for answer in served.again.values()],
        [by_request[request] for request in served.again],
    )
    assert "leak" not in served.log.lower()
    _check_replays(case, replays_in(served.log))
    page, tokens = served.info["page_size"], served.info["max_total_num_tokens"]
    assert tokens == case.max_total_tokens // page * page * 2
    if case.algorithm == "STANDALONE":
        _check_drafted(draft, served.again)
    elif case.draft.endswith("-right"):
        _check_drafted(model_of_transformers, served.again)
    else:
        _check_acceptance(case, served.again)
    print(f"max |d logprob| {request_set.max_difference(served.replies, wanted):.2e}")


def _check_replays(case: Case, replays: Sequence[tuple[int, int]]) -> None:
    """Some are of one request, some are padded, and without the door there are none."""
    if not case.replayed:
        assert not replays
        return
    assert any(requests == padded for requests, padded in replays)
    assert any(requests < padded for requests, padded in replays)


# Its first 100 tokens came from the cache, where the last of them was another prompt's:
# SGLang's draft does not know what follows it.
_OTHER_CACHE = "concurrent-399"


def _check_drafted(draft: Path, answers: Mapping[Request, Answer]) -> None:
    """As many drafts are accepted as by a draft that sees all keys in one place."""
    oracle = DraftOracle(draft, WIDTH)
    for request, answer in answers.items():
        if request.name == _OTHER_CACHE:
            continue
        wanted = oracle.verifications(request.ids, answer.reply.ids)
        assert answer.meta["spec_verify_ct"] == wanted, (request.name, answer.meta)


def _check_acceptance(case: Case, answers: Mapping[Request, Answer]) -> None:
    """By SGLang's own count of verifications: right drafts save them, wrong ones do not.

    The first token of a reply comes from the prefill. A verification gives at least one.
    """
    for request, answer in answers.items():
        tokens = len(answer.reply.ids)
        verified = answer.meta["spec_verify_ct"]
        if case.right:
            known = known_verifications(case.right, len(request.ids), tokens, WIDTH)
            assert verified == known, (request.name, answer.meta)
        else:
            # A random head is right once in a while.
            assert math.ceil((tokens - 1) / WIDTH) <= verified <= tokens - 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
