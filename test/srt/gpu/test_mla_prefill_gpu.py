"""DeepSeek's prefill by MHA on a GPU, all ranks of a DCP group on one GPU.

Only this file sees the kernels of FlashInfer and FA3 with K and V of every head (192 and
128). SGLang's own code of such a prefill calls them and merges. The oracle is a float64
softmax over all keys. What is handed to them: `test_mla_prefill.py`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers.backend_ranks import FP8
from helpers.mla_expanded import DEEPSEEK, Prefill, cases_of, serve
from helpers.nccl_ranks import needs_gpus

pytestmark = needs_gpus(1)

FA3, FLASHINFER = Prefill("fa3"), Prefill("flashinfer")
CASES = {
    f"{base.backend}-{name}": case
    for base in (FA3, FLASHINFER)
    # 1163 positions of prefix in chunks of 400, cut amid d's 1025.
    for name, case in cases_of(base, capacity=400).items()
} | {
    "fa3-heads128": replace(FA3, sizes=DEEPSEEK._replace(heads=128), dcp_size=8),
    "flashinfer-heads128": replace(FLASHINFER, sizes=DEEPSEEK._replace(heads=128)),
    "fa3-fp16": replace(FA3, dtype=torch.float16),
    "flashinfer-fp16": replace(FLASHINFER, dtype=torch.float16),
    "flashinfer-fp8": replace(FLASHINFER, kv_dtype=FP8),
    "flashinfer-fp8-chunks": replace(FLASHINFER, kv_dtype=FP8, capacity=400),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str) -> None:
    serve(CASES[name])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
