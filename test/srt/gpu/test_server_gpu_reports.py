"""Scenarios 10, 11, 15 and 19 of public reports on GPUs (docs/correctness.md has the table).

Only here does every slot of the pool hold infinities before a request writes it, and only
here is the graph of batch 1 captured before that of batch 64. Only here is a request table
of 8.3 GB beside our local one, and do SGLang's all-reduce and `symm_a2a` both use symmetric
memory in a server. All are compared with plain servers that have none of it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence

import pytest

from helpers import teacher_forcing
from helpers.doors import with_door
from helpers.gpu_cases import (
    BACKENDS,
    BF16,
    TP2_DCP2,
    Case,
    Numbers,
    assert_within_spread,
    exchange_flags,
    fleet_fixture,
    params,
)
from helpers.gpu_servers import Fleet
from helpers.nccl_ranks import needs_gpus
from helpers.teacher_forcing import Prompt, Wave

pytestmark = [pytest.mark.server, needs_gpus(2)]

KIND = "llama-2kv-d128"
# Graphs are padded from these to 4 and 8.
BATCHES = (3, 5, 6, 7)
# Weights and activations in fp8: a row of NaN would reach others by a common scale.
FP8_WEIGHTS = Numbers("fp8w", "--dtype bfloat16 --quantization fp8")

# SGLang captures the largest batch first.
SMALLEST_FIRST = """
load_forced = load


def load():
    load_forced()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def capture(original, self, *args, **kwargs):
        sizes = self.capture_bs
        self.capture_bs = list(reversed(sizes))
        original(self, *args, **kwargs)
        self.capture_bs = sizes

    HookRegistry.register(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
        ".DecodeCudaGraphRunner._capture_one_stream",
        capture,
        HookType.AROUND,
    )
"""


def waves() -> list[Wave]:
    """The requests of all files, after batches of sizes that graphs are padded from."""
    draw = random.Random(15)
    small: list[Sequence[Prompt]] = [
        [
            Prompt(
                f"batch-{size}-{place}",
                tuple(draw.randrange(256) for _ in range(1 + 37 * place)),
                24,
            )
            for place in range(size)
        ]
        for size in BATCHES
    ]
    return [*small, *teacher_forcing.build_waves()]


def cases() -> Iterator[Case]:
    for backend, comm in zip(BACKENDS, ("symm_a2a", "a2a", "ag_rs"), strict=True):
        flags = f"--attention-backend {backend} " + exchange_flags(
            comm, replicated=False
        )
        for numbers, how in ((BF16, ""), (FP8_WEIGHTS, ""), (FP8_WEIGHTS, "eager")):
            yield Case(
                KIND,
                TP2_DCP2,
                "-".join(filter(None, ("infinities", backend, numbers.name, how))),
                flags + " --disable-cuda-graph" * (how == "eager"),
                numbers,
                plugin=with_door(teacher_forcing.PLUGIN, "infinities_door"),
            )
        yield Case(
            KIND,
            TP2_DCP2,
            f"smallest-graph-first-{backend}",
            flags,
            plugin=teacher_forcing.PLUGIN + SMALLEST_FIRST,
        )


# As many places as SGLang has by default: 8.3 GB of slots for a context of this length.
MILLION = "--context-length 1010000 --max-running-requests 2048"
LONGER = (("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1"),)
# Of processes that rendezvous twice.
STARTS = 3


def flag_cases() -> Iterator[Case]:
    """Flags that take memory beside the pool, or share what an exchange uses."""
    exchange = exchange_flags("symm_a2a", replicated=True)
    flags = f"--attention-backend fa3 {exchange}"
    yield Case(KIND, TP2_DCP2, "million", f"{flags} {MILLION}", env=LONGER)
    for start in range(STARTS):
        shared = f"{flags} --enable-torch-symm-mem"
        yield Case(KIND, TP2_DCP2, f"torch-symm-mem-{start}", shared)


fleet = fleet_fixture(waves)


@pytest.mark.parametrize("case", params((*cases(), *flag_cases())))
def test_within_the_spread_of_tp(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
