"""Compile, all at once, the FlashInfer kernels that the GPU tests call.

`python warm_flashinfer.py bf16:bf16:128 bf16:fp8:128 ...`, each query dtype : K/V dtype :
head size. FlashInfer compiles a kernel when it is first planned, a minute at a time; with
this they are built side by side. What is in its cache already costs nothing.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def main(kinds: list[str]) -> None:
    from flashinfer.jit.attention import (
        gen_batch_decode_module,
        gen_batch_prefill_module,
    )

    specs = {}
    for kind in kinds:
        q_name, kv_name, dim_name = kind.split(":")
        q, kv, dim = DTYPES[q_name], DTYPES[kv_name], int(dim_name)
        # No position encoding, window, soft cap or fp16 reduction.
        plain = (0, False, False)
        specs[f"decode {kind}"] = gen_batch_decode_module(
            q, kv, q, torch.int32, dim, dim, *plain
        )
        specs[f"paged {kind}"] = gen_batch_prefill_module(
            "fa2", q, kv, q, torch.int32, dim, dim, *plain, False
        )
        # New tokens among themselves are in the query's dtype.
        specs[f"ragged {q_name} {dim}"] = gen_batch_prefill_module(
            "fa3", q, q, q, torch.int32, dim, dim, *plain, False
        )
    # Each by itself, as FlashInfer will: a common build leaves another ninja log, and
    # then everything would be compiled again.
    with ThreadPoolExecutor(len(specs)) as pool:
        list(pool.map(lambda spec: spec.build(verbose=False), specs.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
