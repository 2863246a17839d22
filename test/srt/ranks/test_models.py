"""Every served architecture, with DCP, against tp 1 and Hugging Face transformers.

Only this file builds each model by SGLang's own class and loads a checkpoint of it, so it
finds a model that cuts heads in a way of its own. Each model is prefilled and decoded with
given tokens, and all log-probabilities are compared. It does not start servers.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch

from helpers.model_kinds import MODEL_KINDS
from helpers.model_names import RENAMED
from helpers.model_ranks import (
    FOUND,
    Run,
    found_by_worker,
    hf_logprobs,
    other_weights,
    run_forked,
    run_model,
)
from sglang_dcp.demo.tiny_kinds import KINDS
from sglang_dcp.demo.tiny_model import make_model
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support.architectures import NORMS_OVER_HEADS, served

TP1 = Run("tp1", (("tp_size", 1),))
DCP2 = Run("dcp2", (("tp_size", 2), ("dcp_size", 2), ("dcp_comm_backend", "a2a")))
REPLICATED = Run("dcp2-q", (*DCP2.arguments, ("dcp_replicate_q_proj", True)))
UPDATED = Run("dcp2-q-updated", REPLICATED.arguments, updated=True)
# Two replicas of DP attention, which prefill and decode the same tokens together.
IN_REPLICAS = Run(
    "tp4-dp2-q",
    (
        *(("tp_size", 4), ("dp_size", 2), ("enable_dp_attention", True)),
        *REPLICATED.arguments[1:],
    ),
)
ATTN2 = Run("tp4-attn2", (("tp_size", 4), ("attn_tp_size", 2)))

# Their K weights are cut or repeated for each rank, and replicated Q is refused.
OVER_HEADS = [
    name for name, kind in MODEL_KINDS.items() if kind.architecture in NORMS_OVER_HEADS
]
# GQA and MLA: new weights reach a replicated Q projection, and K weights that were gathered.
UPDATES = ("mimo", "deepseek-v3")
# GQA and MLA: each replica has a Q projection as wide as its own DCP group.
IS_NEW = in_range(sglang_version(), "0.5.23", None)
REPLICAS = ("bailing-moe-v2", "glm4-moe", "deepseek-v3") if IS_NEW else ()
# Set it to run each model in every way, which takes twice as long.
ALL_RUNS = bool(os.environ.get("SGLANG_DCP_TEST_ALL_RUNS"))


def _runs(name: str) -> tuple[Run, ...]:
    """With replicated Q, a prefill projects as without. So one run covers both."""
    if name in OVER_HEADS:
        return TP1, DCP2, ATTN2
    updated = (UPDATED,) * (name in UPDATES)
    if not ALL_RUNS:
        return (TP1, REPLICATED, *updated)
    replicas = (IN_REPLICAS,) * (name in REPLICAS)
    return (TP1, DCP2, REPLICATED, ATTN2, *updated, *replicas)


CASES = {
    name: _runs(name)
    for name, kind in MODEL_KINDS.items()
    if kind.extra.get("architectures", [kind.architecture])[0] in served()
}
# Of log-probabilities. SGLang computes an activation of Apertus and of Gemma in 16 bit.
TP1_TOLERANCE, HF_TOLERANCE = 1e-4, 1e-2
_IMPORTED = (
    "sglang.benchmark.one_batch",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.registry",
    "transformers.models.auto.modeling_auto",
)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker found: by model and run, the distances or the fault."""
    folder = tmp_path_factory.mktemp("models")
    # One model compiles its norms, which takes longer than all else here.
    return found_by_worker(__file__, folder, TORCHDYNAMO_DISABLE="1")


@pytest.mark.parametrize(
    ("name", "run"), [(name, run.name) for name in CASES for run in CASES[name][1:]]
)
def test_model(name: str, run: str, verdicts: dict[str, Any]) -> None:
    alone, found = verdicts[name]["tp1"], verdicts[name][run]
    assert not alone["fault"], f"tp 1: {alone['fault']}"
    assert not found["fault"], found["fault"]
    print(f"{name} {run}: from tp 1 {found['tp1']:.1e}, from HF {found['hf']:.1e}")
    # Written so that a NaN is a fault too.
    assert found["tp1"] < TP1_TOLERANCE
    assert found["hf"] < HF_TOLERANCE


def test_each_served_architecture_has_a_tiny_model() -> None:
    kinds = [*MODEL_KINDS.values(), *KINDS.values()]
    named = {k.extra.get("architectures", [k.architecture])[0] for k in kinds}
    assert set(served()) <= named


def _verdicts(name: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    model = folder / "model"

    def make() -> None:
        make_model(model, name, MODEL_KINDS[name])
        make_model(other_weights(model), name, MODEL_KINDS[name], seed=1)
        if name in RENAMED:
            RENAMED[name].prepare(model)
        torch.save(hf_logprobs(model), folder / "hf.pt")
        if name in RENAMED:
            RENAMED[name].apply(model)

    [fault] = run_forked([make], folder, "hf")
    assert not fault, f"{name}: {fault}"
    oracle = {"hf": torch.load(folder / "hf.pt")}
    found: dict[str, dict[str, Any]] = {}
    for run in CASES[name]:
        faults = [f for f in run_model(model, run, folder) if f]
        found[run.name] = verdict = dict[str, Any](fault="\n".join(faults))
        if faults:
            continue
        ranks = [torch.load(folder / f"{run.name}-{r}.pt") for r in range(run.ranks)]
        oracle.setdefault("tp1", ranks[0])
        for key, want in oracle.items():
            verdict[key] = max(_distance(got, want) for got in ranks)
    return found


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).abs().max())


def _work(folder: Path) -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found = {name: _verdicts(name, folder / name) for name in _chosen()}
    (folder / FOUND).write_text(json.dumps(found))


def _chosen() -> Iterator[str]:
    yield from os.environ.get("SGLANG_DCP_TEST_MODELS", ",".join(CASES)).split(",")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(Path(sys.argv[2]))
    else:
        sys.exit(pytest.main([__file__]))
