"""Live servers, end to end: DCP = tp 1 = Hugging Face transformers, in fp32.

Only here do scheduler, radix tree, allocator, chunked prefill, overlap, model code,
head sharding, pool and exchange meet. Every case runs the whole request set of `request_set`
and checks what the server says of its own capacity afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError

import pytest

from helpers import request_set
from helpers.doors import with_door
from helpers.latents_in_graphs_door import tokens_in
from helpers.prefill_graph import HAS_PREFILL_GRAPHS
from helpers.servers import plugin_folder, server
from helpers.short_prefill_door import chains_in, steps_in
from sglang_dcp.demo.client import Reply, http_json, open_local
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.server

# SGLang's leak check at idle is on by default, this one after every batch is not.
CHECK_EVERY_BATCH = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


@dataclass(frozen=True)
class Case:
    """One layout; `flags` beside model, device and dtype.

    With `fills_pool`, prompts about as long as the pool are sent, too. A `fresh` server
    is started as a user starts it. `form` is that of prefills over K/V heads: by the rule
    all gather at these lengths, and with an entry of `FORMS` they take another one.
    """

    kind: str
    flags: str
    max_total_tokens: int = 4096
    page_size: int = 1
    dcp_size: int = 2
    fills_pool: bool = False
    fresh: bool = False
    form: str = "gathered"

    @property
    def gathers(self) -> bool:
        """Whether some prefill gathers K and V: by their lengths, those over a prefix do.

        Where chunks of 64 tokens are decode steps, none of these prefills does.
        """
        has_prefix = "--disable-radix-cache" not in self.flags
        by_rule = self.form == "gathered" and not self.kind.startswith("mla")
        return has_prefix and by_rule

    @property
    def per_rank(self) -> int:
        """KV tokens of a rank: SGLang rounds the pool down to whole logical pages."""
        page = self.page_size * self.dcp_size
        return self.max_total_tokens // page * page


# Plugins of servers whose prefills have another form.
FORMS = {
    "in-place": """
def load():
    from sglang_dcp.layers import kv_prefill
    from sglang_dcp.layers.prefix.kv_form import KvForm

    kv_prefill.choose_kv_form = lambda requests, sizes: KvForm.IN_PLACE
""",
    "chain": with_door("def load(): ...\n", "chain_steps_door"),
    "in-graph": with_door("def load(): ...\n", "latents_in_graphs_door"),
}

CASES = {
    # A decode inside a prefill batch is the one prefix that is no multiple of DCP.
    "llama-2kv-tp2-dcp2-a2a-chunk64-mixed": Case(
        "llama-2kv",
        "--tp 2 --dcp-size 2 --dcp-comm-backend a2a --chunked-prefill-size 64 "
        "--enable-mixed-chunk",
        fresh=True,
    ),
    # 300 tokens a rank: requests of 397 and 399 are longer than one rank's pool, and
    # eight at once (1111) evict what the radix tree holds.
    "llama-8kv-tp2-dcp2-ag_rs-replicated-page4-eviction": Case(
        "llama-8kv",
        "--tp 2 --dcp-size 2 --dcp-replicate-q-proj --page-size 4 "
        "--chunked-prefill-size 64",
        max_total_tokens=300,
        page_size=4,
        fills_pool=True,
    ),
    "llama-odd-tp2-dcp2-a2a-no-overlap": Case(
        "llama-odd",
        "--tp 2 --dcp-size 2 --dcp-comm-backend a2a --disable-overlap-schedule",
    ),
    "qwen2-tp2-attn-tp1-ag_rs-replicated-no-radix": Case(
        "qwen2",
        "--tp 2 --attn-tp-size 1 --dcp-replicate-q-proj --disable-radix-cache",
    ),
    "qwen3-tp2-attn-tp1-a2a-replicated-chunk64": Case(
        "qwen3",
        "--tp 2 --attention-tensor-parallel-size 1 --dcp-comm-backend a2a "
        "--dcp-replicate-q-proj --chunked-prefill-size 64",
        form="in-place",
    ),
    "qwen3-moe-tp2-dcp2-a2a": Case(
        "qwen3-moe", "--tp 2 --dcp-size 2 --dcp-comm-backend a2a"
    ),
    "mla-dense-tp2-dcp2-ag_rs-page4": Case(
        "mla-dense",
        "--tp 2 --decode-context-parallel-size 2 --page-size 4",
        page_size=4,
    ),
    "mla-moe-tp2-dcp2-a2a-replicated-chunk64": Case(
        "mla-moe",
        "--tp 2 --dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj "
        "--chunked-prefill-size 64",
        form="chain",
    ),
    "mla-v3-tp2-dcp2-ag_rs-replicated-page4-chunk64-mixed": Case(
        "mla-v3",
        "--tp 2 --dcp-size 2 --dcp-replicate-q-proj --page-size 4 "
        "--chunked-prefill-size 64 --enable-mixed-chunk",
        page_size=4,
        form="in-graph",
    ),
    "mla-glm-tp2-dcp2-a2a-replicated-chunk64": Case(
        "mla-glm",
        "--tp 2 --dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj "
        "--chunked-prefill-size 64",
        form="in-graph",
    ),
    "llama-2kv-tp4-attn-tp2-a2a-replicated": Case(
        "llama-2kv",
        "--tp 4 --attn-tp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj",
    ),
    "llama-8kv-tp4-attn-tp2-ag_rs-chunk64": Case(
        "llama-8kv", "--tp 4 --attn-tp-size 2 --chunked-prefill-size 64", form="chain"
    ),
}


def as_served(case: Case) -> Case:
    """The case by this release of SGLang, where earlier ones have no hook for a form."""
    if HAS_PREFILL_GRAPHS or case.form == "in-place":
        return case
    return replace(case, form="gathered")


@dataclass(frozen=True)
class Reference:
    """What tp 1 answers to the request set."""

    requests: list[request_set.Request]
    replies: list[Reply]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a kind, made once."""
    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(root / kind, kind)


@pytest.fixture(scope="module")
def reference(
    models: Callable[[str], Path], request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Reference]]:
    """tp 1 without DCP flags, once a kind and compared with transformers.

    They run beside the DCP servers: a start is mostly one core's work.
    """
    tests = [i for i in request.session.items if isinstance(i, pytest.Function)]
    cases = [
        cast(Case, i.callspec.params["case"])
        for i in tests
        if i.function is test_equal_to_tp1
    ]
    with ThreadPoolExecutor(max_workers=1) as pool:
        runs = {
            kind: pool.submit(_run_reference, models(kind))
            for kind in dict.fromkeys(case.kind for case in cases)
        }
        yield lambda kind: runs[kind].result()
        pool.shutdown(cancel_futures=True)


def _run_reference(model: Path) -> Reference:
    requests = request_set.build_requests()
    flags = "--tp 1 --attention-backend torch_native --max-total-tokens 4096"
    with server(model, flags) as tp1:
        replies = request_set.run_requests(tp1.base_url, requests)
    oracle = request_set.hf_reference(model, requests)
    request_set.assert_equal_to_reference(requests, replies, oracle)
    return Reference(requests, replies)


@pytest.mark.parametrize("case", map(as_served, CASES.values()), ids=CASES.keys())
def test_equal_to_tp1(
    case: Case,
    models: Callable[[str], Path],
    reference: Callable[[str], Reference],
    tmp_path: Path,
) -> None:
    env = dict(CHECK_EVERY_BATCH)
    if case.form in FORMS:
        env |= plugin_folder(tmp_path, "form_of_prefills", FORMS[case.form])
    flags = f"{case.flags} --max-total-tokens {case.max_total_tokens} --enable-metrics"
    model = models(case.kind)
    with server(model, flags, env, fresh=case.fresh) as dcp:
        replies = request_set.run_requests(dcp.base_url, request_set.build_requests())
        info = http_json(f"{dcp.base_url}/server_info")
        metrics = _metrics(dcp)
        if case.fills_pool:
            _check_longest_prompts(dcp, case)
        log = dcp.log_path.read_text(errors="replace")
    want = reference(case.kind)
    request_set.assert_equal_to_reference(want.requests, replies, want.replies)
    logical = case.per_rank * case.dcp_size
    assert info["max_total_num_tokens"] == logical
    ranks = int(case.flags.split("--tp ")[1].split()[0])
    sizes = (info["dcp_size"], info["attn_tp_size"])
    assert sizes == (case.dcp_size, ranks // case.dcp_size)
    assert metrics["sglang:max_total_num_tokens"] == logical
    assert f"KV tokens: {case.per_rank} per rank, {logical} in all" in log
    assert "leak" not in log.lower()
    assert ("DCP prefill gathers K and V" in log) == case.gathers
    assert ("is one decode step" in log) == (case.form == "chain")
    if case.form == "chain":
        # All tokens of the requests that are not in the cache, and the warm-up's.
        assert sum(steps_in(log)) >= sum(_new_tokens(replies))
        # Requests alone are chains, requests at once are rows.
        assert 0 < len(chains_in(log)) < len(steps_in(log))
    if case.form == "in-graph":
        # A line for each layer.
        assert sum(tokens_in(log)) >= 2 * sum(_new_tokens(replies))
    print(f"max |d logprob| {request_set.max_difference(replies, want.replies):.2e}")


def _new_tokens(replies: list[Reply]) -> Iterator[int]:
    """How many tokens of its prompt each request of the set brought."""
    for request, reply in zip(request_set.build_requests(), replies):
        yield len(request.ids) - (reply.cached_tokens or 0)


def _check_longest_prompts(dcp: ServerProcess, case: Case) -> None:
    """Those that reach into the last two logical pages are refused, and block no one."""
    page = case.page_size * case.dcp_size
    bound = case.per_rank * case.dcp_size - 2 * page

    def ask(tokens: int) -> int:
        sampling = {"max_new_tokens": 3, "ignore_eos": True}
        payload = {"input_ids": [65] * tokens, "sampling_params": sampling}
        answer = http_json(f"{dcp.base_url}/generate", payload, timeout=60)
        return len(answer["output_ids"])

    for tokens in (bound, bound + 1, bound + page, bound + 2 * page, bound + 3 * page):
        with pytest.raises(HTTPError) as caught:
            ask(tokens)
        assert caught.value.code == 400, tokens
    assert ask(bound - 1) == ask(5) == 3


def _metrics(dcp: ServerProcess) -> dict[str, float]:
    """Gauges of rank 0 by name."""
    with open_local(f"{dcp.base_url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        if line.startswith("sglang:") and " " in line:
            name, value = line.rsplit(" ", 1)
            found.setdefault(name.split("{")[0], float(value))
    return found


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
