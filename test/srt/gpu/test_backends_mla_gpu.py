"""Latent attention on a GPU under DCP, all ranks of a DCP group on one GPU.

Only this file sees the MLA kernels of FlashInfer and FA3, with their plans and captured
graphs, on shards without a key and on ragged prefixes, against a float64 softmax over
all keys. What the backends hand to them: `test_backends_mla.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers.attention_oracle import Shape
from helpers.backend_groups import serve
from helpers.backend_ranks import FP8, Case
from helpers.nccl_ranks import needs_gpus

pytestmark = needs_gpus(1)


def latent(heads: int) -> Shape:
    """DeepSeek's latent of 512 and rotary part of 64."""
    return Shape(heads, 1, 576, 512, latent=True)


def cases_of(backend: str) -> dict[str, Case]:
    base = Case(backend, latent(16))
    named = {
        f"dcp{dcp}-page{page}": replace(base, dcp_size=dcp, page_size=page)
        for dcp, page in ((2, 1), (2, 16), (2, 64), (4, 16), (4, 64), (8, 1), (8, 64))
    }
    # Own heads: 4 of 12.
    named["dcp3"] = replace(base, shape=latent(12), dcp_size=3)
    for dcp, page in ((2, 64), (8, 1)):
        wide = replace(base, shape=latent(128), dcp_size=dcp, page_size=page)
        named[f"heads128-dcp{dcp}-page{page}"] = wide
    named["fp16"] = replace(base, dtype=torch.float16)
    named["idle-scale"] = replace(base, idle_scale=0.5)
    return {f"{backend}-{name}": case for name, case in named.items()}


FLASHINFER_FP8 = Case("flashinfer", latent(16), kv_dtype=FP8)
CASES = {
    **cases_of("fa3"),
    **cases_of("flashinfer"),
    "flashinfer-fp8": FLASHINFER_FP8,
    "flashinfer-fp8-page64-dcp4": replace(FLASHINFER_FP8, page_size=64, dcp_size=4),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str) -> None:
    serve(CASES[name])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
