"""Live servers with DP attention: a DCP layout in each replica, in fp32.

Only here do replicas have batches of different sizes, or none, while their ranks share the
MoE layers, the MLPs and the LM head. The oracle is Hugging Face transformers, and in the
long cases tp 1 and DP attention without DCP too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import request_set
from helpers.generate import Answer, generate
from helpers.model_kinds import MODEL_KINDS
from helpers.needs_sglang import needs_sglang
from helpers.request_set import Request
from helpers.servers import server
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_kinds import KINDS
from sglang_dcp.demo.tiny_model import make_model

pytestmark = pytest.mark.server

SERVES_REPLICAS = needs_sglang("0.5.23", "DCP refuses DP attention with this SGLang")

CHECK_EVERY_BATCH = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
REPLICAS = DCP_SIZE = 2
# 0.5.23 calls it --attn-dp-size, too.
DP = "--tp 4 --enable-dp-attention --dp-size 2"
PLAIN = "--attention-backend torch_native"
POOL = 4096


@dataclass(frozen=True)
class Case:
    """One server of two replicas; `flags` beside those of DP attention.

    A rank's pool has `pool` tokens. `beside_plain` compares DP attention without DCP, too.
    """

    kind: str
    flags: str
    pool: int = POOL
    page_size: int = 1
    beside_plain: bool = False


# Qwen2-MoE and MiniMax-M2 are not among them. SGLang has only GPU kernels for the shared
# expert of the one and for the norms of the other.
SHORT = Case("qwen3", "--dcp-size 2 --chunked-prefill-size 128")
LONG = {
    "qwen3-attn-tp1-a2a-replicated-mixed": Case(
        "qwen3",
        "--attn-tp-size 1 --dcp-comm-backend a2a --dcp-replicate-q-proj "
        "--chunked-prefill-size 128 --enable-mixed-chunk",
        beside_plain=True,
    ),
    # 300 tokens a rank: eight requests at once evict what the radix tree holds.
    "qwen3-moe-ag_rs-lm-head-page4-eviction": Case(
        "qwen3-moe",
        "--dcp-size 2 --enable-dp-lm-head --page-size 4",
        pool=300,
        page_size=4,
    ),
    "mla-moe-a2a-replicated-chunk128": Case(
        "mla-moe",
        "--dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj "
        "--chunked-prefill-size 128",
        beside_plain=True,
    ),
    # Dense layers whose tokens are scattered over the ranks of a replica.
    "mla-moe-ag_rs-dense-tp1-lm-head": Case(
        "mla-moe", "--dcp-size 2 --moe-dense-tp-size 1 --enable-dp-lm-head"
    ),
    "mla-v3-ag_rs-page4-no-overlap": Case(
        "mla-v3",
        "--dcp-size 2 --page-size 4 --disable-overlap-schedule",
        page_size=4,
    ),
    "mla-glm-a2a-chunk128": Case(
        "mla-glm", "--dcp-size 2 --dcp-comm-backend a2a --chunked-prefill-size 128"
    ),
    "glm4-moe-ag_rs-replicated": Case(
        "glm4-moe", "--dcp-size 2 --dcp-replicate-q-proj"
    ),
}


@dataclass(frozen=True)
class Reference:
    """What Hugging Face transformers, tp 1 and DP attention without DCP answer."""

    requests: list[Request]
    replies: list[Reply]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a kind, made once."""
    root = tmp_path_factory.mktemp("models")
    kinds = {**MODEL_KINDS, **KINDS}
    return lambda kind: make_model(root / kind, kind, kinds[kind])


@pytest.fixture(scope="module")
def references(
    models: Callable[[str], Path],
) -> Iterator[Callable[[str], Reference]]:
    """transformers on the request set, once a kind."""
    known: dict[str, Reference] = {}

    def reference(kind: str) -> Reference:
        if kind not in known:
            requests = request_set.build_requests()
            replies = request_set.hf_reference(models(kind), requests)
            known[kind] = Reference(requests, replies)
        return known[kind]

    yield reference


@SERVES_REPLICAS
def test_replicas_with_dcp(
    models: Callable[[str], Path], references: Callable[[str], Reference]
) -> None:
    check(SHORT, models, references)


@SERVES_REPLICAS
@pytest.mark.long
@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_replicas_with_dcp_long(
    case: Case, models: Callable[[str], Path], references: Callable[[str], Reference]
) -> None:
    check(case, models, references)


@pytest.mark.long
@pytest.mark.parametrize(
    "scatter", ["--moe-dense-tp-size 1", "--enable-attn-tp-input-scattered"]
)
def test_scattered_tokens_without_replicas(
    scatter: str,
    models: Callable[[str], Path],
    references: Callable[[str], Reference],
) -> None:
    """The scatter that MoE all-to-all needs, over all ranks: SGLang pads each prefill."""
    flags = "--tp 4 --attn-tp-size 2 --dcp-comm-backend a2a"
    flags = f"{flags} {scatter} --max-total-tokens {POOL}"
    want = references("mla-moe")
    with server(models("mla-moe"), flags, CHECK_EVERY_BATCH) as dcp:
        replies = request_set.run_requests(dcp.base_url, want.requests)
    request_set.assert_equal_to_reference(want.requests, replies, want.replies)


def check(
    case: Case,
    models: Callable[[str], Path],
    references: Callable[[str], Reference],
) -> None:
    model = models(case.kind)
    want = references(case.kind)
    if case.beside_plain:
        for flags in ("--tp 1", DP):
            _check_plain(model, f"{flags} {PLAIN} --max-total-tokens {POOL}", want)
    flags = f"{DP} {case.flags} --max-total-tokens {case.pool}"
    with server(model, flags, CHECK_EVERY_BATCH) as dcp:
        replies = request_set.run_requests(dcp.base_url, want.requests)
        request_set.assert_equal_to_reference(want.requests, replies, want.replies)
        difference = request_set.max_difference(replies, want.replies)
        for busy in range(REPLICAS):
            _check_one_busy(dcp, want, busy)
        _check_uneven(dcp, want)
        _check_capacity(dcp, case)
        log = dcp.log_path.read_text(errors="replace")
    assert "leak" not in log.lower()
    # Each replica has ranks 0 and 1 of a layout of its own.
    layouts = re.findall(
        r"DP(\d) TP(\d).*?DCP layout: 2 ranks = attn_tp 1 x dcp 2", log
    )
    assert sorted(layouts) == [("0", "0"), ("1", "2")]
    print(f"{case.kind} {case.flags}: max |d logprob| {difference:.2e}")


def _check_plain(model: Path, flags: str, want: Reference) -> None:
    with server(model, flags, CHECK_EVERY_BATCH) as plain:
        replies = request_set.run_requests(plain.base_url, want.requests)
    request_set.assert_equal_to_reference(want.requests, replies, want.replies)


def _check_one_busy(dcp: ServerProcess, want: Reference, busy: int) -> None:
    """One replica has eight requests at once, the other none, in every step."""
    chosen = [pair for pair in zip(want.requests, want.replies) if pair[0].concurrent]
    assert len(chosen) == 8
    _check_routed(dcp, [(*pair, busy) for pair in chosen])


def _check_uneven(dcp: ServerProcess, want: Reference) -> None:
    """Replica 1 decodes one request for long, while replica 0 prefills and ends others."""
    by_name = {
        request.name: (request, reply)
        for request, reply in zip(want.requests, want.replies)
    }
    others = [pair for pair in by_name.values() if pair[0].concurrent]
    routed = [(*by_name["long-decode"], 1), *((*pair, 0) for pair in others)]
    _check_routed(dcp, routed)


def _check_routed(
    dcp: ServerProcess, routed: Sequence[tuple[Request, Reply, int]]
) -> None:
    """Send all at once, each to its replica, and compare."""

    def ask(request: Request, replica: int) -> Answer:
        greedy = {
            "temperature": 0,
            "max_new_tokens": request.max_new_tokens,
            "ignore_eos": True,
        }
        fields = {"sampling_params": greedy, "routed_dp_rank": replica}
        return generate(dcp.base_url, request.ids, request.max_new_tokens, **fields)

    with ThreadPoolExecutor(len(routed)) as pool:
        jobs = [pool.submit(ask, request, replica) for request, _, replica in routed]
        answers = [job.result() for job in jobs]
    assert [answer.meta["dp_rank"] for answer in answers] == [at for *_, at in routed]
    request_set.assert_equal_to_reference(
        [request for request, *_ in routed],
        [answer.reply for answer in answers],
        [reply for _, reply, _ in routed],
    )


def _check_capacity(dcp: ServerProcess, case: Case) -> None:
    """Each replica counts the tokens of its own ranks."""
    info = http_json(f"{dcp.base_url}/server_info")
    page = case.page_size * DCP_SIZE
    assert info["max_total_num_tokens"] == case.pool // page * page * DCP_SIZE
    assert (info["dcp_size"], info["attn_tp_size"]) == (DCP_SIZE, 1)
    sizes = [
        (state["dcp_size"], state["attn_tp_size"]) for state in info["internal_states"]
    ]
    assert sizes == [(DCP_SIZE, 1)] * REPLICAS


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
