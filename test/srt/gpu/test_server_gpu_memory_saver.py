"""Sleep and wake: `--enable-memory-saver` with `symm_a2a`, a replicated Q and CUDA graphs.

Scenario 3 of public reports (docs/correctness.md has the table). Only here do a KV pool,
weights and graphs leave the GPU and come back, with new weights in between. What a server
says after each of five cycles must be what it said before. Asleep, it may hold little more
than a plain server does.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from helpers import teacher_forcing
from helpers.generate import flush_cache
from helpers.gpu_cases import BF16, TP2_DCP2, exchange_flags
from helpers.gpu_servers import Spec, live
from helpers.nccl_ranks import needs_gpus
from helpers.teacher_forcing import CountedReply, Prompt, Wave
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess

pytestmark = [pytest.mark.server, needs_gpus(2)]

CYCLES = 5
TAGS = ("kv_cache", "weights", "cuda_graph")
ENVIRONMENT = (("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "1"),)
FLAGS = f"{BF16.flags} --attention-backend fa3 --enable-memory-saver"
LAYOUTS = {
    # SGLang refuses prefill graphs whose memory is released. DCP turns them off by itself.
    "plain": "--tp 2 --disable-prefill-cuda-graph",
    "dcp": f"{TP2_DCP2.flags} {exchange_flags('symm_a2a', replicated=True)}",
}
# Two runs of one server may differ by the order of sums, in the last bits of bf16.
SAME = 0.005
# Inboxes of `symm_a2a`, communicators of the DCP groups, gathered K weights of MLA.
MORE_ASLEEP = 1 << 30


@dataclass
class Nights:
    """What a server said after each cycle, the first entry before any; bytes asleep.

    What other processes held at its start is left out, so nothing else may start or grow
    beside it.
    """

    replies: list[dict[str, CountedReply]]
    asleep: list[int]


def waves() -> list[Wave]:
    """Batches of 1, 3 and 8, that graphs are padded from and to."""
    draw = random.Random(3)

    def prompt(size: int, place: int) -> Prompt:
        ids = tuple(draw.randrange(256) for _ in range(5 + 61 * place))
        return Prompt(f"{size}-{place}", ids, 24)

    return [[prompt(size, place) for place in range(size)] for size in (1, 3, 8)]


def spend_nights(spec: Spec, folder: Path) -> Nights:
    nights = Nights([], [])
    others = used_bytes()
    with live(spec, folder) as server:
        nights.replies.append(teacher_forcing.ask(server.base_url, waves()))
        for _ in range(CYCLES):
            # A server that still puts its last request away ends with an assertion.
            flush_cache(server.base_url)
            post(server, "release_memory_occupation", tags=TAGS)
            nights.asleep.append(used_bytes() - others)
            # Weights come back empty, and are loaded before anything reads them.
            post(server, "resume_memory_occupation", tags=["weights"])
            weights = str(spec.checkpoint(folder))
            answer = post(server, "update_weights_from_disk", model_path=weights)
            assert answer["success"], answer
            post(server, "resume_memory_occupation", tags=["kv_cache", "cuda_graph"])
            nights.replies.append(teacher_forcing.ask(server.base_url, waves()))
        assert server.returncode is None
    return nights


def post(server: ServerProcess, path: str, **body: object) -> dict[str, object]:
    return http_json(f"{server.base_url}/{path}", body) or {}


def used_bytes() -> int:
    """Of the first GPU, by all processes."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Nights]:
    """One server after the other: the second would count what the first holds."""
    pytest.importorskip("torch_memory_saver", reason="needs torch_memory_saver")
    folder = tmp_path_factory.mktemp("nights")
    return {
        name: spend_nights(
            Spec(name, "llama-8kv-d64", f"{FLAGS} {layout}", env=ENVIRONMENT), folder
        )
        for name, layout in LAYOUTS.items()
    }


def test_the_same_after_each_cycle(nights: dict[str, Nights]) -> None:
    found = nights["dcp"].replies
    assert len(found) == CYCLES + 1
    gaps = [teacher_forcing.distance(later, found[0]) for later in found[1:]]
    print("\n".join(f"cycle {number}: {gap}" for number, gap in enumerate(gaps, 1)))
    # Written so that a NaN is a fault too.
    assert all(gap.mean < SAME for gap in gaps)


def test_little_is_held_asleep(nights: dict[str, Nights]) -> None:
    plain, dcp = (nights[name].asleep for name in LAYOUTS)
    print(f"bytes asleep: plain {plain}, DCP {dcp}")
    assert max(dcp) - min(plain) < MORE_ASLEEP
    # No cycle leaves anything behind.
    assert dcp[-1] - dcp[1] < MORE_ASLEEP / 16


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
