"""Live servers on GPUs with quantized weights: formats x models x exchanges x Q widths.

Only here do the kernels of quantized layers run with K/V heads and Q projections that DCP
cut: weights that were repacked for a kernel, and decode in CUDA graphs on them. Each server
is measured against plain servers of the same checkpoint. `-k` chooses cases by the words in
their names (`-k "fp8-block and replicated"`).

The plugin opens servers with replicated Q in formats that DCP still refuses. Their pools
hold infinities before a request writes to them, so padded graphs run over such pages in every
format, with K/V heads and with latents, at both widths of Q.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BF16,
    EXPAND_PREFIXES,
    MARGIN,
    TP2_DCP2,
    Case,
    Numbers,
    assert_within_spread,
    behind_door,
    distance_from_tp2,
    exchange_case,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.quantized import FORMATS, ONLINE_FP8
from helpers.quantized_checkpoint import KV_SCALES, QUANTIZED_KINDS, SCALED_KIND
from helpers.teacher_forcing import Prompt, Wave
from helpers.weight_updates import UPDATES, Update, assert_answers_as_loaded

pytestmark = [pytest.mark.server, pytest.mark.long, needs_gpus(2)]

BATCHES = (1, 3, 5, 8, 64)
# SGLang's kernels for these experts take the dtype of the scales, which is float16.
FP16 = Numbers("fp16", "--dtype float16")
FP16_EXPERTS = ("awq", "gptq")
# What SGLang itself cannot serve. It has INT8 experts for NPUs alone. For AWQ and latents,
# 0.5.23 imports a module that it does not have (`models/deepseek_common/utils.py`).
NOT_BY_SGLANG = {"qwen3-moe+int8-channel", "mla-v3+int8-channel", "mla-v3+awq"}
# Experts and latents whose kernels make plain tp 2 differ from plain tp 1 by 0.4 to 1.2. DCP
# was within 0.006 of plain tp 2 there (docs/correctness.md).
FAR_FROM_TP1 = {"qwen3-moe+awq", "qwen3-moe+gptq", "mla-v3+gptq"}
NEAR_TP2 = 0.02
ONLINE = Numbers("fp8-online", f"--dtype bfloat16 {ONLINE_FP8.flags}")
ONLINE_KINDS = ("llama-2kv-d128", "qwen3-moe-d128", "mla-v3+bf16")
EXCHANGES = tuple(product(("a2a", "symm_a2a"), (False, True)))


def build_waves(seed: int = 0) -> list[Wave]:
    """One batch of each size. Prompts differ, so rows leave at different steps."""
    draw = random.Random(seed)

    def prompt(size: int, index: int) -> Prompt:
        length = 1 + (37 * index * size) % 700
        ids = tuple(draw.randrange(256) for _ in range(length))
        return Prompt(f"{index}-of-{size}", ids, 32 + index % 5)

    waves: list[Wave] = [[prompt(n, i) for i in range(n)] for n in BATCHES]
    return [*waves, *teacher_forcing.build_waves()[6:11]]


def cases() -> Iterator[Case]:
    named = [(kind, dtype_of(kind)) for kind in checkpoints()]
    named += [(kind, ONLINE) for kind in ONLINE_KINDS]
    for (kind, numbers), exchange in product(named, EXCHANGES):
        case = exchange_case(kind, TP2_DCP2, "fa3", exchange, ("", "--page-size 16"))
        label = f"{case.label}{numbers.name}"
        yield replace(case, label=label, numbers=of_one_form(kind, numbers))


def checkpoints() -> list[str]:
    """Kinds as `kind+format`, of all that SGLang serves."""
    every = (f"{kind}+{form}" for form in FORMATS for kind in QUANTIZED_KINDS)
    return [kind for kind in every if kind not in NOT_BY_SGLANG]


def dtype_of(kind: str) -> Numbers:
    model, form = kind.split("+")
    return FP16 if form in FP16_EXPERTS and model != "qwen3-2kv" else BF16


def of_one_form(kind: str, numbers: Numbers) -> Numbers:
    """Plain MLA servers that expand each prefix.

    DCP expands one where that is faster, and SGLang only one of 8192 positions or more. The
    two forms round quantized products in different places.
    """
    if not kind.startswith("mla"):
        return numbers
    name = f"{numbers.name}-expanded"
    return replace(numbers, name=name, plain_env=EXPAND_PREFIXES)


def kv_scales() -> Iterator[Case]:
    """An fp8 KV cache under quantized weights, on the backends that read one.

    One checkpoint has no scales of K and V, and the other has some that differ by layer.
    """
    kinds = ("qwen3-2kv+fp8-block", f"{SCALED_KIND}+{KV_SCALES}")
    for kind, backend in product(kinds, ("fa3", "flashinfer", "triton")):
        flags = "--dtype bfloat16 --kv-cache-dtype fp8_e4m3"
        yield Case(
            kind,
            TP2_DCP2,
            f"{backend}-fp8kv",
            f"--attention-backend {backend} " + exchange_flags("a2a", replicated=True),
            Numbers(f"fp8kv-{backend}", flags, backend),
        )


def behind_the_door() -> Iterator[Case]:
    for case in (*cases(), *kv_scales()):
        yield behind_door(case, "replication_door", "infinities_door")


fleet = fleet_fixture(build_waves)


@pytest.mark.parametrize("case", params(behind_the_door()))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    """Near plain tp 1, and near plain tp 2.

    Where plain tp 2 is far from plain tp 1, any wrong head may hide in its distance from
    plain tp 1. There DCP must be within `NEAR_TP2` of plain tp 2, whose kernels see the
    same cut of the weights. Elsewhere the margin is that of the distance from plain tp 1.
    """
    spread = assert_within_spread(case, fleet)
    far = case.kind in FAR_FROM_TP1
    most = NEAR_TP2 if far else MARGIN * spread.mean
    assert distance_from_tp2(case, fleet).mean < most
    ran = fleet.run(case.spec).decode_batches(graph=not case.eager)
    assert {*BATCHES} <= ran, ran


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", [f"{kind}+fp8-block" for kind in QUANTIZED_KINDS])
def test_updated_weights_answer_as_loaded_ones(
    kind: str, update: Update, tmp_path: Path
) -> None:
    """Of the other formats, SGLang itself takes no weights once it has repacked them."""
    exchange = "symm_a2a", True
    case = exchange_case(kind, TP2_DCP2, "fa3", exchange, ("updated", ""))
    old = behind_door(case, "replication_door").spec
    assert_answers_as_loaded(old, replace(old, name="loaded", seed=1), update, tmp_path)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
