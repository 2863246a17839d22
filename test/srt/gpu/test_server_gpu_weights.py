"""New weights under live DCP servers with a replicated Q projection, in CUDA graphs.

Only here does a captured decode step read replicated Q weights that were gathered again
after its capture: a server whose weights were updated must answer as one that loaded them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.gpu_cases import TP2_DCP2, exchange_case
from helpers.nccl_ranks import needs_gpus
from helpers.weight_updates import UPDATES, Update, assert_answers_as_loaded

pytestmark = [pytest.mark.server, needs_gpus(2)]

KINDS = ("llama-8kv-d64", "qwen3-moe-d128", "mla-moe-d512")


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_updated_weights_answer_as_loaded_ones(
    kind: str, update: Update, tmp_path: Path
) -> None:
    exchange = "symm_a2a", True
    old = exchange_case(kind, TP2_DCP2, "fa3", exchange, ("updated", "")).spec
    assert_answers_as_loaded(old, replace(old, name="loaded", seed=1), update, tmp_path)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
