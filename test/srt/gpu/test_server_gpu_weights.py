"""New weights under live DCP servers with a replicated Q projection, in CUDA graphs.

Only here does a captured decode step read wide Q weights that were gathered anew after its
capture: a server whose weights were updated must answer as one that loaded them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import TP2_DCP2, exchange_case
from helpers.gpu_servers import make_server
from helpers.nccl_ranks import needs_gpus
from helpers.servers import READY_SECONDS
from sglang_dcp.demo.client import http_json

pytestmark = [pytest.mark.server, needs_gpus(2)]


@pytest.mark.parametrize("kind", ["llama-8kv-d64", "mla-moe-d512"])
def test_updated_weights_answer_as_loaded_ones(kind: str, tmp_path: Path) -> None:
    waves = teacher_forcing.build_waves()[:-1]
    exchange = "symm_a2a", True
    old = exchange_case(kind, TP2_DCP2, "fa3", exchange, ("updated", "")).spec
    new = replace(old, name="loaded", seed=1)
    with make_server(old, tmp_path) as updated, make_server(new, tmp_path) as loaded:
        for server in (updated, loaded):
            server.wait_ready(READY_SECONDS)
        before = teacher_forcing.ask(updated.base_url, waves)
        answer = http_json(
            f"{updated.base_url}/update_weights_from_disk",
            {"model_path": str(new.checkpoint(tmp_path))},
        )
        assert answer["success"], answer
        after = teacher_forcing.ask(updated.base_url, waves)
        wanted = teacher_forcing.ask(loaded.base_url, waves)
    far, near = (teacher_forcing.distance(found, wanted) for found in (before, after))
    print(f"{kind}: |d logprob| before {far}; after {near}")
    assert near.mean < far.mean / 100
    assert near.worst_request < far.worst_request / 20


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
