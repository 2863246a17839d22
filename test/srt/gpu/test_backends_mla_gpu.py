"""Latent attention on a GPU under DCP, all ranks of a DCP group on one GPU.

Only this file sees the MLA kernels of FlashInfer and FA3, with their plans and captured
graphs, on shards without a key and on ragged prefixes, against a float64 softmax over
all keys. It alone replays graphs of several batch sizes behind one plan of FlashInfer's.
What the backends hand to the kernels: `test_backends_mla.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.attention_oracle import Shape
from helpers.backend_groups import TOLERANCE, serve
from helpers.backend_ranks import FP8, Case
from helpers.mla_kernels_torch import attend_pages
from helpers.nccl_ranks import needs_gpus
from sglang_dcp.layers.backends.flashinfer_plan import (
    Sizes,
    latent_wrapper,
    plan_pages,
)

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
    serve(CASES[name], speculates=True)


PAGE_SIZE, PAGES, HEADS = 16, 64, 16


class CapturedDecode:
    """Attention by FlashInfer with one query of each of `size` requests, in a graph."""

    def __init__(self, wrapper: Any, keys: Tensor, table: Tensor, size: int) -> None:
        self._keys, self._table = keys.split([512, 64], -1), table
        rows = torch.randn(size, HEADS, 576, device="cuda", dtype=keys.dtype)
        self._q = rows.split([512, 64], -1)
        plan_of_decode(wrapper, [1] * size, table)
        wrapper.run(self._q, self._keys)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._found = wrapper.run(self._q, self._keys)

    def check(self, lens: list[int]) -> None:
        """A replay attends to the keys of the plan made last, which was for `lens`."""
        self._graph.replay()
        ends = list(range(len(lens) + 1))
        firsts = [self._table.shape[1] * row for row in ends]
        pages, how = self._table.view(-1), (576**-0.5, False)
        wanted = attend_pages(self._q, self._keys, ends, firsts, lens, pages, how)
        at_most = TOLERANCE[None]
        for got, want in zip(self._found, wanted):
            torch.testing.assert_close(got, want, rtol=at_most, atol=at_most)


def plan_of_decode(wrapper: Any, lens: list[int], table: Tensor) -> None:
    """Other pages in the table, and a plan for them."""
    table.copy_(torch.randint(1, PAGES, table.shape))
    dtype, device = torch.bfloat16, torch.device("cuda")
    sizes = Sizes(HEADS, 512, 64, 576**-0.5, dtype, dtype, PAGE_SIZE, device)
    plan_pages(wrapper, sizes, HEADS, [1] * len(lens), torch.tensor(lens), table)


def test_flashinfers_graphs_of_all_sizes_read_the_plan_made_last() -> None:
    """An eager step in between has another table of pages."""
    from flashinfer import BatchMLAPagedAttentionWrapper

    scratch = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = latent_wrapper(BatchMLAPagedAttentionWrapper(scratch, backend="fa3"))
    keys = torch.randn(PAGES, PAGE_SIZE, 576, device="cuda", dtype=torch.bfloat16)
    table = torch.zeros(4, 32, dtype=torch.int32, device="cuda")
    captured = {size: CapturedDecode(wrapper, keys, table, size) for size in (4, 1)}
    for lens in ([500, 1, 16, 77], [300], [1, 2, 3, 4], [17]):
        plan_of_decode(wrapper, [9] * 7, table.new_zeros(7, 3))
        plan_of_decode(wrapper, lens, table)
        captured[len(lens)].check(lens)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
