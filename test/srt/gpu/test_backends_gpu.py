"""The attention backends of a GPU under DCP, all ranks of a DCP group on one GPU.

Only this file sees kernels, plans and captured graphs of each backend with head sizes,
dtypes, fp8 scales and lengths of our choosing, against a float64 softmax over all keys.
Latent attention: `test_backends_mla_gpu.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers.attention_oracle import Shape, extend, mixed
from helpers.backend_groups import serve
from helpers.backend_ranks import FP8, Case
from helpers.nccl_ranks import needs_gpus

pytestmark = needs_gpus(1)


def heads(dim: int, q_heads: int = 8, kv_heads: int = 2) -> Shape:
    return Shape(q_heads, kv_heads, dim, dim)


def cases_of(backend: str, dims: tuple[int, ...]) -> dict[str, Case]:
    """`dims`: head sizes beside 128."""
    shapes = {
        "one-kv-head": heads(128, 8, 1),
        "no-grouping": heads(128, 4, 4),
        "own-heads-span-kv-heads": heads(128, 16, 8),
        "uneven-12-3": heads(128, 12, 3),
    }
    named = {name: Case(backend, shape) for name, shape in shapes.items()}
    named |= {f"dim{dim}": Case(backend, heads(dim)) for dim in dims}
    named |= {
        f"dcp{dcp}-page{page}": Case(backend, dcp_size=dcp, page_size=page)
        for dcp, page in ((2, 16), (2, 64), (4, 16), (8, 1))
    }
    named["dcp3"] = Case(backend, heads(128, 12, 2), dcp_size=3)
    named["fp16"] = Case(backend, dtype=torch.float16)
    named["fp8"] = Case(backend, kv_dtype=FP8)
    named["fp8-page64-dcp4"] = Case(backend, kv_dtype=FP8, dcp_size=4, page_size=64)
    named["fp8-scaled"] = Case(backend, kv_dtype=FP8, scale=0.5)
    named["fp8-of-fp16"] = Case(backend, dtype=torch.float16, kv_dtype=FP8)
    named["idle-scale"] = Case(backend, idle_scale=0.5)
    for name, case in list(named.items()):
        if case.kv_dtype is None:
            named[f"gathered-{name}"] = replace(case, gathers=True)
    return {f"{backend}-{name}": case for name, case in named.items()}


CASES = {
    **cases_of("fa3", (64, 96, 192, 256)),
    **cases_of("flashinfer", (64, 256)),
    **cases_of("triton", (64, 80, 256)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str) -> None:
    serve(CASES[name], speculates=True)


@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
@pytest.mark.parametrize("shape", [heads(128, 8, 1), heads(128, 12, 3)], ids=str)
def test_short_turns_on_a_long_gathered_prefix(backend: str, shape: Shape) -> None:
    """`fa3` splits the keys of `a`, beside requests with few keys and with none."""
    case = Case(backend, shape, gathers=True, max_len=4500)
    serve(case, [extend(a=4200, b=3), mixed(a=100, b=1, c=9), mixed(a=1, c=2)], None)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
