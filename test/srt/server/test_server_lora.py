"""Live servers with LoRA adapters: DCP = tp 1 = transformers with merged weights.

Only here do adapters meet K/V heads that are sharded over fewer ranks than query heads.
One server answers with several adapters at once, loads more than its slots hold, and loads
and unloads at run time. Grammars ride on the same servers.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional
from urllib.error import HTTPError

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.generate import flush_cache
from helpers.lora_adapters import GQA, MLP, Adapter, write_adapter, write_merged
from helpers.request_set import (
    Request,
    assert_equal_to_reference,
    hf_reference,
    max_difference,
)
from helpers.servers import server
from sglang_dcp.demo.client import Reply, greedy, http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.server

_MLA = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")
# Two slots for three adapters and the base model, so adapters are evicted.
_FLAGS = (
    "--lora-backend torch_native --max-loras-per-batch 2 --max-total-tokens 4096 "
    "--chunked-prefill-size 64 --constrained-json-disable-any-whitespace"
)

GQA_ADAPTERS = {
    "all": Adapter(8, 16, GQA + MLP, seed=1),
    "some": Adapter(4, 6, ("q_proj", "v_proj"), seed=2),
    "late": Adapter(6, 6, GQA, seed=3),
}
MLA_ADAPTERS = {
    "all": Adapter(8, 16, _MLA, seed=1),
    "some": Adapter(4, 6, ("q_b_proj", "o_proj"), seed=2),
    "late": Adapter(6, 6, _MLA, seed=3),
}
# Of the attention of a model with experts.
ATTENTION_ADAPTERS = {**GQA_ADAPTERS, "all": Adapter(8, 16, GQA, seed=1)}
PLAIN = "--tp 1 --attention-backend torch_native"
PAGE4_MIXED = "--page-size 4 --enable-mixed-chunk"


@dataclass(frozen=True)
class Case:
    kind: str
    flags: str
    adapters: dict[str, Adapter]


CASES = {
    "llama-1kv-tp2-dcp2-ag_rs": Case("llama-1kv", "--tp 2 --dcp-size 2", GQA_ADAPTERS),
    # With biases, and two K/V heads on two attention ranks.
    "qwen2-tp4-attn-tp2-a2a": Case(
        "qwen2", "--tp 4 --attn-tp-size 2 --dcp-comm-backend a2a", GQA_ADAPTERS
    ),
    "mla-moe-tp2-dcp2-a2a": Case(
        "mla-moe", "--tp 2 --dcp-size 2 --dcp-comm-backend a2a", MLA_ADAPTERS
    ),
    "llama-2kv-tp2-dcp2-a2a-page4-mixed": Case(
        "llama-2kv",
        f"--tp 2 --dcp-size 2 --dcp-comm-backend a2a {PAGE4_MIXED}",
        GQA_ADAPTERS,
    ),
    "qwen3-moe-tp2-dcp2-ag_rs": Case(
        "qwen3-moe", "--tp 2 --dcp-size 2", ATTENTION_ADAPTERS
    ),
    "qwen3-moe-tp4-attn-tp2-a2a-page4-mixed": Case(
        "qwen3-moe",
        f"--tp 4 --attn-tp-size 2 --dcp-comm-backend a2a {PAGE4_MIXED}",
        ATTENTION_ADAPTERS,
    ),
    "mla-moe-tp2-dcp2-ag_rs-page4-mixed": Case(
        "mla-moe", f"--tp 2 --dcp-size 2 {PAGE4_MIXED}", MLA_ADAPTERS
    ),
}
# CI has no time for four ranks, nor for each model with and without pages.
LONG = (
    "qwen2-tp4-attn-tp2-a2a",
    "qwen3-moe-tp4-attn-tp2-a2a-page4-mixed",
    "mla-moe-tp2-dcp2-ag_rs-page4-mixed",
)


def requests_with_adapters() -> list[tuple[Request, Optional[str]]]:
    """Ragged requests; each prompt is sent with and without each adapter."""
    draw = random.Random(4)
    found: list[tuple[Request, Optional[str]]] = []
    for length in (1, 30, 131):
        ids = tuple(draw.randrange(256) for _ in range(length))
        for name in (None, "all", "some"):
            found.append((Request(f"{name}-{length}", ids, 9), name))
    return found


def ask(
    running: ServerProcess, batch: Sequence[tuple[Request, Optional[str]]]
) -> list[Reply]:
    """Greedy replies to requests that arrive together."""
    replies = []
    for answer in _post(running, batch, return_logprob=True):
        pairs = answer["meta_info"]["output_token_logprobs"]
        replies.append(Reply([int(p[1]) for p in pairs], [float(p[0]) for p in pairs]))
    return replies


def ask_for_ids(
    running: ServerProcess, batch: Sequence[tuple[Request, Optional[str]]]
) -> list[list[int]]:
    """The same ids without log-probabilities: SGLang mixes no chunk with those.

    The cache is empty before and after.
    """
    flush_cache(running.base_url)
    answers = _post(running, batch, return_logprob=False)
    flush_cache(running.base_url)
    return [answer["output_ids"] for answer in answers]


def _post(
    running: ServerProcess,
    batch: Sequence[tuple[Request, Optional[str]]],
    *,
    return_logprob: bool,
) -> list[dict[str, Any]]:
    payload = {
        "input_ids": [list(request.ids) for request, _ in batch],
        "lora_path": [name for _, name in batch],
        "sampling_params": [
            {
                "temperature": 0,
                "max_new_tokens": request.max_new_tokens,
                "ignore_eos": True,
            }
            for request, _ in batch
        ],
        "return_logprob": return_logprob,
    }
    found: list[dict[str, Any]] = http_json(
        f"{running.base_url}/generate", payload, timeout=120
    )
    return found


class Oracle:
    """Replies of transformers, with the weights of each adapter merged, and of tp 1.

    `largest` are the largest differences of a log-probability from both.
    """

    def __init__(self, root: Path, model: Path, adapters: dict[str, Adapter]) -> None:
        self._models: dict[Optional[str], Path] = {None: model}
        for name, adapter in adapters.items():
            merged = root / "merged" / name
            self._models[name] = write_merged(merged, model, adapter)
        self._tp1: dict[str, Reply] = {}
        self.largest = {"transformers": 0.0, "tp 1": 0.0}

    def learn(
        self,
        batch: Sequence[tuple[Request, Optional[str]]],
        replies: Sequence[Reply],
    ) -> None:
        """Take what tp 1 replies to `batch`."""
        self._tp1.update(zip((request.name for request, _ in batch), replies))

    def check(
        self,
        batch: Sequence[tuple[Request, Optional[str]]],
        replies: Sequence[Reply],
    ) -> None:
        requests = [request for request, _ in batch]
        self._compare("tp 1", requests, replies, [self._tp1[r.name] for r in requests])
        for name, model in self._models.items():
            rows = [i for i, (_, used) in enumerate(batch) if used == name]
            if rows:
                own = [requests[i] for i in rows]
                got = [replies[i] for i in rows]
                self._compare("transformers", own, got, hf_reference(model, own))

    def _compare(
        self,
        oracle: str,
        requests: Sequence[Request],
        got: Sequence[Reply],
        wanted: Sequence[Reply],
    ) -> None:
        assert_equal_to_reference(requests, got, wanted)
        self.largest[oracle] = max(self.largest[oracle], max_difference(got, wanted))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(root / kind, kind)


def _params() -> Iterator[object]:
    for name, case in CASES.items():
        marks = [pytest.mark.long] if name in LONG else []
        yield pytest.param(case, id=name, marks=marks)


@pytest.mark.parametrize("case", list(_params()))
def test_adapters_equal_to_merged_weights(
    case: Case, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models(case.kind)
    paths = {
        name: write_adapter(tmp_path / name, model, adapter)
        for name, adapter in case.adapters.items()
    }
    oracle = Oracle(tmp_path, model, case.adapters)
    # `--enable-lora` is not needed beside the paths.
    started = f"--lora-paths all={paths['all']} some={paths['some']}"
    batch = requests_with_adapters()
    with server(model, f"{PLAIN} {_FLAGS} {started}") as tp1:
        oracle.learn(batch, ask(tp1, batch))
        _load(tp1, paths["late"])
        oracle.learn(LATE, ask(tp1, LATE))
    with server(model, f"{case.flags} {_FLAGS} {started}") as dcp:
        replies = ask(dcp, batch)
        oracle.check(batch, replies)
        assert ask_for_ids(dcp, batch) == [reply.ids for reply in replies]
        _check_load_and_unload(dcp, oracle, paths["late"])
        oracle.check(batch[:3], ask(dcp, batch[:3]))
        _check_grammars(dcp, model)
    found = [f"{value:.2g} from {name}" for name, value in oracle.largest.items()]
    print(f"{case.kind} {case.flags}: largest differences {', '.join(found)}")


def test_no_adapter_comes_beside_a_replicated_q(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Not at run time either: without LoRA at start, SGLang takes none."""
    model = models("llama-1kv")
    path = write_adapter(tmp_path / "late", model, GQA_ADAPTERS["late"])
    flags = "--tp 2 --dcp-size 2 --dcp-replicate-q-proj --max-total-tokens 512"
    with server(model, flags) as dcp:
        for asks in (lambda: _load(dcp, path), lambda: ask(dcp, LATE[:1])):
            with pytest.raises(HTTPError) as caught:
                asks()
            assert caught.value.code == 400
            assert b"LoRA is not enabled" in caught.value.read()
        [reply] = greedy(dcp.base_url, [LATE[0][0].ids], 9)
        assert len(reply.ids) == 9


# The adapter of the first one comes at run time.
LATE: list[tuple[Request, Optional[str]]] = [
    (Request(f"late-{name}", tuple(range(40, 95)), 9), name)
    for name in ("late", "all", None)
]


def _load(running: ServerProcess, path: Path) -> None:
    named = {"lora_name": "late", "lora_path": str(path)}
    assert http_json(f"{running.base_url}/load_lora_adapter", named)["success"]


def _check_load_and_unload(dcp: ServerProcess, oracle: Oracle, path: Path) -> None:
    """An adapter of run time answers right, also where SGLang loads it once more."""
    with pytest.raises(HTTPError) as caught:
        ask(dcp, LATE)
    assert caught.value.code == 400
    _load(dcp, path)
    oracle.check(LATE, ask(dcp, LATE))
    for gone in ("late", "some"):
        left = http_json(f"{dcp.base_url}/unload_lora_adapter", {"lora_name": gone})
        assert left["success"] and gone not in left["loaded_adapters"]
    # Requests load again what they name.
    oracle.check(LATE, ask(dcp, LATE))


def _check_grammars(dcp: ServerProcess, model: Path) -> None:
    """Replies that a grammar bounds, in one batch with a reply that none bounds."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": ["red", "green"]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    bounds: list[dict[str, Any]] = [
        {"regex": "[a-c]{3,7}x"},
        {"json_schema": json.dumps(schema)},
        {"ebnf": 'root ::= "yes" | "no"'},
        {},
    ]
    prompt = list(b"Hello")
    payload = {
        "input_ids": [prompt] * len(bounds),
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": 40, **bound} for bound in bounds
        ],
    }
    answers = http_json(f"{dcp.base_url}/generate", payload, timeout=120)
    texts = [answer["text"] for answer in answers]
    assert texts[0] == _bounded_greedy(model, prompt), texts
    assert json.loads(texts[1])["n"] in ("red", "green"), texts
    assert texts[2] in ("yes", "no") and len(texts[3]) == 40, texts


def _bounded_greedy(model: Path, prompt: list[int]) -> str:
    """What transformers answers if only `[a-c]{3,7}x` is allowed."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = ""
    while not text.endswith("x"):
        allowed = ("abc" if len(text) < 7 else "") + ("x" if len(text) >= 3 else "")
        with torch.inference_mode():
            logits = network(torch.tensor([prompt + list(text.encode())])).logits[0, -1]
        text += max(allowed, key=lambda char: float(logits[ord(char)]))
    return text


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
