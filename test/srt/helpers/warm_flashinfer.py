"""Compile, all at once, the kernels that the GPU tests call and that are built when used.

`python warm_flashinfer.py bf16:bf16:128 bf16:fp8:128 bf16:bf16:mla fp16:marlin ...`, each query
dtype : K/V dtype : head size, or `mla` for DeepSeek's latents. FlashInfer compiles a kernel
when it is first planned, a minute at a time; with this they are built side by side. What is
in its cache already costs nothing.

`fp16:marlin` stands for SGLang's kernels of AWQ, GPTQ and W4A16 weights, with experts. Each is
one file with 170 to 270 instances of a kernel, so one core compiles it for minutes. A server
needs three of them one after the other, in its first forward.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
# No position encoding, window, soft cap or fp16 reduction.
PLAIN = (0, False, False)
LATENT, ROPE = 512, 64
# K and V of a head in a prefill by MHA.
EXPANDED = 192, 128
# SGLang 0.5.23's and 0.5.16's.
LATENT_WRITES = (
    "sglang.kernels.ops.kvcache.set_mla_kv_buffer",
    "sglang.jit_kernel.set_mla_kv_buffer",
)


def heads_of(dim: int, q: torch.dtype, kv: torch.dtype) -> dict[str, Any]:
    """Decode, paged and ragged prefill with heads of one size."""
    from flashinfer import prefill
    from flashinfer.jit.attention import (
        gen_batch_decode_module,
        gen_batch_prefill_module,
    )

    # FlashInfer 0.7 compiles FA2's for K and V of equal strides, by another name.
    primary = "_gen_batch_prefill_primary_module"
    gen_paged = getattr(prefill, primary, gen_batch_prefill_module)
    sizes = (q, torch.int32, dim, dim, *PLAIN)
    return {
        f"decode {q} {kv} {dim}": gen_batch_decode_module(q, kv, *sizes),
        f"paged {q} {kv} {dim}": gen_paged("fa2", q, kv, *sizes, False),
        # New tokens among themselves are in the query's dtype.
        f"ragged {q} {dim}": gen_batch_prefill_module("fa3", q, q, *sizes, False),
    }


def latents(q: torch.dtype, kv: torch.dtype) -> dict[str, Any]:
    """FlashInfer's MLA kernel of this GPU, over the cache and over new tokens, and MHA."""
    from flashinfer.jit.attention import (
        gen_batch_mla_module,
        gen_batch_prefill_module,
    )
    from flashinfer.utils import is_sm90a_supported

    backend = "fa3" if is_sm90a_supported(torch.device("cuda")) else "fa2"
    absorbed = {
        f"mla {q} {cached}": gen_batch_mla_module(
            backend, q, cached, q, torch.int32, LATENT, ROPE, False
        )
        for cached in (kv, q)
    }
    sizes = (q, torch.int32, *EXPANDED, *PLAIN)
    mha = gen_batch_prefill_module("fa3", q, q, *sizes, False)
    return {**absorbed, f"mha {q}": mha}


def build_latent_write(kv: torch.dtype) -> None:
    """SGLang's own kernel that writes latents, of 768 tokens on."""
    known = next(filter(importlib.util.find_spec, LATENT_WRITES))
    module = importlib.import_module(known)
    if not module.can_use_set_mla_kv_buffer(LATENT * kv.itemsize, ROPE * kv.itemsize):
        raise RuntimeError(f"SGLang's write of {kv} latents does not compile")


def marlin_builds(dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Build what `gptq_marlin_gemm` and `fused_marlin_moe` of SGLang 0.5.23 load."""
    from sglang.kernels.ops.gemm.gptq_marlin import _jit_gptq_marlin_module
    from sglang.kernels.ops.moe.moe_wna16_marlin import _jit_moe_wna16_marlin_module

    def experts(*, down: bool) -> Any:
        # No expert parallelism and no bias. The down projection zeroes what it leaves out.
        return _jit_moe_wna16_marlin_module(dtype, False, False, True, down, True)

    return [
        partial(_jit_gptq_marlin_module, dtype),
        partial(experts, down=False),
        partial(experts, down=True),
    ]


def main(kinds: list[str]) -> None:
    specs: dict[str, Any] = {}
    writes: set[torch.dtype] = set()
    marlin: list[Callable[[], Any]] = []
    for kind in kinds:
        if kind.endswith(":marlin"):
            marlin += marlin_builds(DTYPES[kind.removesuffix(":marlin")])
            continue
        q_name, kv_name, dim = kind.split(":")
        q, kv = DTYPES[q_name], DTYPES[kv_name]
        if dim == "mla":
            specs |= latents(q, kv)
            writes.add(kv)
        else:
            specs |= heads_of(int(dim), q, kv)
    jobs: list[Callable[[], Any]] = [
        # Each by itself, as FlashInfer will: a common build leaves another ninja log, and
        # then everything would be compiled again.
        *(lambda spec=spec: spec.build(verbose=False) for spec in specs.values()),
        *(lambda kv=kv: build_latent_write(kv) for kv in writes),
        *marlin,
    ]
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()


if __name__ == "__main__":
    main(sys.argv[1:])
