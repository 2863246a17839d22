"""Whole quantized checkpoints, loaded by SGLang's models on real ranks with replicated Q.

Only this file loads a checkpoint of each format as a server does, by its config.json and the
names in it, for GQA, MoE and MLA. Layers are built as on a Hopper GPU, and stay as they were
loaded: nothing is repacked and no kernel runs. The Q projections, and the K weights that MLA
absorbs, are compared with the checkpoint.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Iterable, Iterator

import pytest
import torch

from helpers.model_ranks import (
    FOUND,
    found_by_worker,
    free_port,
    load_runner,
    run_forked,
)
from helpers.quantized import FORMATS
from helpers.quantized_checkpoint import (
    FORMS,
    KV_SCALES,
    SCALED_KIND,
    kv_scales,
    make_quantized,
)
from helpers.quantized_layers import (
    build_as_on_hopper,
    keep_as_loaded,
    read_back,
)

RANKS = 2
ARGUMENTS = (
    ("tp_size", RANKS),
    ("dcp_size", RANKS),
    ("dcp_comm_backend", "a2a"),
    ("dcp_replicate_q_proj", True),
    ("dtype", "bfloat16"),
)
# Experts of the other formats are built with kernels that a CPU has not.
MOE = ("fp8-block", "fp8-tensor", "fp8-tensor-static", "fp8-channel")
CASES = [
    *(("qwen3-2kv", name) for name in FORMATS),
    *((kind, name) for kind in ("qwen3-moe", "mla-v3") for name in MOE),
]
CASES.append((SCALED_KIND, KV_SCALES))
# Scales that are cut as the weights are, and K weights with one scale on each rank.
SHORT = (("qwen3-2kv", "fp8-block"), (SCALED_KIND, KV_SCALES), ("mla-v3", "fp8-tensor"))


@pytest.fixture(scope="module")
def faults(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, str]:
    """What the worker found, by kind and format: the faults of the ranks, or ""."""
    folder = tmp_path_factory.mktemp("quantized")
    chosen = (f"{kind} {name}" for kind, name in _chosen(request))
    return found_by_worker(__file__, folder, *chosen)


def _chosen(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The cases of this file that pytest selected."""
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path:
            params = item.callspec.params
            yield str(params["kind"]), str(params["name"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(*case, marks=[pytest.mark.long] * (case not in SHORT))
        for case in CASES
    ],
)
def test_loaded_on_all_ranks(kind: str, name: str, faults: dict[str, str]) -> None:
    assert not faults[f"{kind} {name}"], faults[f"{kind} {name}"]


def _check_rank(model: Path, name: str, rank: int, port: int) -> None:
    build_as_on_hopper(pytest.MonkeyPatch())
    keep_as_loaded()
    runner = load_runner(model, ARGUMENTS, rank, port).torch_runner
    weights = _stored(model)
    form = FORMS[name]
    seen = 0
    for prefix, module in runner.model.named_modules():
        if hasattr(module, "qkv_proj"):
            _check_qkv(form, prefix, module, weights)
            if name == KV_SCALES:
                _check_kv_scales(seen, prefix, module)
            seen += 1
        elif hasattr(module, "forward_absorb_prepare"):
            _check_mla(form, prefix, module, weights, rank)
            seen += 1
    assert seen == 3


def _stored(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


def _matrix(form: Any, weights: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    found = {
        key.removeprefix(f"{module}."): tensor
        for key, tensor in weights.items()
        if key.startswith(f"{module}.")
    }
    return form.dequantize(found)


def _check_qkv(form: Any, prefix: str, module: Any, weights: Any) -> None:
    """With dcp 2 over 2 ranks, each rank has all heads of Q, K and V."""
    parts = [_matrix(form, weights, f"{prefix}.{part}_proj") for part in "qkv"]
    got = read_back(form, module.qkv_proj)
    torch.testing.assert_close(got, torch.cat(parts), rtol=4e-3, atol=0)


def _check_kv_scales(layer: int, prefix: str, module: Any) -> None:
    """Each rank divides by the same numbers, whatever part of the sequence it holds."""
    found = {
        f"{prefix}.{part}_proj.{part}_scale": getattr(module.attn, f"{part}_scale")
        for part in "kv"
    }
    wanted = kv_scales(layer)
    assert {*found} == {*wanted}
    for name, scale in found.items():
        torch.testing.assert_close(scale.data.cpu(), wanted[name], rtol=0, atol=0)


def _check_mla(form: Any, prefix: str, module: Any, weights: Any, rank: int) -> None:
    want = _matrix(form, weights, f"{prefix}.q_b_proj")
    got = read_back(form, module.q_b_proj)
    torch.testing.assert_close(got, want, rtol=4e-3, atol=0)
    heads, nope = module.num_heads, module.qk_nope_head_dim
    kv_b = _matrix(form, weights, f"{prefix}.kv_b_proj")
    k = kv_b.unflatten(0, (heads, -1))[:, :nope]
    # Here every fp8 format ends with one scale on each rank. A rank rounds to it once.
    replicas = module.forward_absorb_prepare.__self__
    whole = replicas._absorbed._of_all["w_kc"].double()
    assert whole.shape == k.shape and module.w_kc.itemsize == 1
    own = slice(rank * heads // RANKS, (rank + 1) * heads // RANKS)
    assert _far(module.w_kc.double() * float(module.w_scale), k[own]) < 0.04
    assert _far(whole, k) < 0.04


def _far(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _work(folder: Path, cases: Iterable[str]) -> None:
    for module in ("sglang.benchmark.one_batch", "sglang.srt.models.registry"):
        importlib.import_module(module)
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found = dict(_faults(folder, cases))
    (folder / FOUND).write_text(json.dumps(found))


def _faults(folder: Path, cases: Iterable[str]) -> Iterator[tuple[str, str]]:
    for kind, name in (case.split() for case in cases):
        model, label = folder / f"{kind}-{name}", f"{kind}-{name}"

        def make(model: Path = model, kind: str = kind, name: str = name) -> None:
            make_quantized(model, kind, name)

        [fault] = run_forked([make], folder, f"make-{label}")
        port = free_port()
        ranks = [
            lambda rank=rank: _check_rank(model, name, rank, port)
            for rank in range(RANKS)
        ]
        found = [fault] if fault else run_forked(ranks, folder, label)
        yield f"{kind} {name}", "\n".join(filter(None, found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(pytest.main([__file__]))
