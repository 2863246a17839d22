"""Live replicas (`--dp-size` without DP attention), each of them against tp 1.

Only here do several DCP worlds share one launch: each replica has its own ranks, groups,
pool and radix tree, and both are at work at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import request_set
from helpers.generate import Answer, generate
from helpers.request_set import Request
from helpers.servers import everything_of, server, title
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = [pytest.mark.server, pytest.mark.long]

REPLICAS = (0, 1)
END_S = 180


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a kind, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(root / kind, kind)


def ask(base_url: str, requests: Sequence[Request], replica: int) -> list[Answer]:
    """The request set on one replica: those that run alone in order, the rest at once."""

    def one(request: Request) -> Answer:
        return generate(
            base_url, request.ids, request.max_new_tokens, routed_dp_rank=replica
        )

    alone = {r: one(r) for r in requests if not r.concurrent}
    together = [r for r in requests if r.concurrent]
    with ThreadPoolExecutor(len(together)) as pool:
        alone.update(zip(together, pool.map(one, together)))
    return [alone[request] for request in requests]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("llama-2kv", "--dcp-comm-backend a2a --dcp-replicate-q-proj --page-size 2"),
        ("mla-moe", "--chunked-prefill-size 64"),
    ],
    ids=["llama-2kv-a2a-replicated-page2", "mla-moe-ag_rs-chunk64"],
)
def test_each_replica_equals_tp1(
    kind: str, flags: str, models: Callable[[str], Path]
) -> None:
    model, requests = models(kind), request_set.build_requests()
    plain = "--tp 1 --attention-backend torch_native --max-total-tokens 4096"
    with server(model, plain) as tp1:
        want = request_set.run_requests(tp1.base_url, requests)
    flags = f"--tp 2 --dcp-size 2 {flags} --max-total-tokens 2048 --enable-metrics"
    with server(model, f"{flags} --dp-size 2 --enable-cache-report") as dcp:
        with ThreadPoolExecutor(len(REPLICAS)) as pool:
            answers = list(
                pool.map(lambda rank: ask(dcp.base_url, requests, rank), REPLICAS)
            )
        info = http_json(f"{dcp.base_url}/server_info")
        log = dcp.log_path.read_text(errors="replace")
    for rank, found in zip(REPLICAS, answers):
        assert {answer.meta["dp_rank"] for answer in found} == {rank}
        replies = [answer.reply for answer in found]
        request_set.assert_equal_to_reference(requests, replies, want)
        # A tree of its own: it hits what this replica has seen, and nothing else.
        names = {r.name: reply for r, reply in zip(requests, replies)}
        assert names["base-131"].cached_tokens == 0 < names["repeat-131"].cached_tokens
        print(f"max |d logprob| {request_set.max_difference(replies, want):.2e}")
    assert info["max_total_num_tokens"] == 4096
    states = info["internal_states"]
    assert [(s["dcp_size"], s["attn_tp_size"]) for s in states] == [(2, 1)] * 2
    assert log.count("DCP layout: 2 ranks = attn_tp 1 x dcp 2") == len(REPLICAS)
    assert "leak" not in log.lower()


def test_a_dead_rank_of_one_replica_ends_the_server(
    models: Callable[[str], Path],
) -> None:
    flags = "--tp 2 --dcp-size 2 --dp-size 2 --max-total-tokens 512"
    with server(models("llama-2kv"), flags) as dcp:
        [dead] = [p for p in everything_of(dcp) if "scheduler_DP1_TP1" in title(p)]
        dead.send_signal(signal.SIGKILL)
        dcp.wait_exit(END_S)
        log = dcp.log_path.read_text(errors="replace")
    assert "Scheduler hit an exception" in log


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
