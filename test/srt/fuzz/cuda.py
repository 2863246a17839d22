"""Mixes on GPUs: forced tokens in 16 bit, and plain tp 2 under the same load as measure.

Greedy answers of two servers part at the first near tie. So a plugin forces the tokens
(`helpers.teacher_forcing`), and log-probabilities are compared over all of them. A mean
distance from tp 1 below `MARGIN` times that of plain tp 2 passes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.client import Answer, Client, run_alone
from fuzz.compare import Judge
from fuzz.drive import Result, run_mixes
from fuzz.mixes import Ask, Mix
from fuzz.servers import Setting
from helpers import teacher_forcing
from helpers.gpu_servers import POOL, Spec, make_server
from helpers.servers import READY_SECONDS
from sglang_dcp.demo.server import ServerProcess

MARGIN = 1.5
TAIL_MARGIN = 3.0

SETTINGS: Mapping[str, Setting] = {
    "llama-fa3-symm_a2a-page16-mixed": Setting(
        "llama-2kv-d128",
        "--tp 2 --attn-tp-size 1 --attention-backend fa3 "
        "--dcp-comm-backend symm_a2a --dcp-replicate-q-proj",
        "--chunked-prefill-size 100 --enable-mixed-chunk",
        per_rank=1024,
        page_size=16,
    ),
    "llama-triton-a2a-page1": Setting(
        "llama-8kv-d64",
        "--tp 2 --attn-tp-size 1 --attention-backend triton --dcp-comm-backend a2a",
        "--chunked-prefill-size 64",
        per_rank=256,
    ),
    "qwen3-moe-flashinfer-ag_rs-page1-mixed": Setting(
        "qwen3-moe-d128",
        "--tp 2 --attn-tp-size 1 --attention-backend flashinfer "
        "--dcp-comm-backend ag_rs",
        "--chunked-prefill-size 64 --enable-mixed-chunk",
        per_rank=256,
    ),
    "mla-fa3-symm_a2a-page64": Setting(
        "mla-moe-d512",
        "--tp 2 --attn-tp-size 1 --attention-backend fa3 --dcp-comm-backend symm_a2a",
        "--chunked-prefill-size 256",
        per_rank=1024,
        page_size=64,
    ),
    "mla-flashinfer-a2a-page1-mixed": Setting(
        "mla-v3-d512",
        "--tp 2 --attn-tp-size 1 --attention-backend flashinfer "
        "--dcp-comm-backend a2a --dcp-replicate-q-proj",
        "--chunked-prefill-size 64 --enable-mixed-chunk",
        per_rank=256,
    ),
}


@dataclass
class Distance:
    """|d log-probability| of forced tokens from those of tp 1."""

    tokens: int = 0
    total: float = 0.0
    worst: float = 0.0
    left_out: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.tokens)

    def add(
        self, asks: Iterable[Ask], got: Iterable[Answer], want: Iterable[Answer]
    ) -> None:
        """Count the tokens that both have.

        A token without a number on both sides is left out: sampling rules it out. So is one
        without on one side, if the request counts its tokens. With the overlap scheduler,
        SGLang may end `min_new_tokens` a token late. Any other one makes the total NaN.
        """
        for ask, a, b in zip(asks, got, want):
            for left, right in zip(a.outputs, b.outputs):
                for (x, _), (y, _) in zip(left.logprobs, right.logprobs):
                    missing = (x is None) + (y is None)
                    if missing == 2 or missing and ask.counts_its_tokens:
                        self.left_out += 1
                        continue
                    gap = math.nan if x is None or y is None else abs(x - y)
                    self.tokens += 1
                    self.total += gap
                    self.worst = max(self.worst, gap)

    def within(self, spread: Distance) -> bool:
        """Whether this is as near as `spread`, times the margins. Not with a NaN."""
        return (
            self.mean < MARGIN * spread.mean and self.worst < TAIL_MARGIN * spread.worst
        )

    def __str__(self) -> str:
        found = f"mean {self.mean:.3g} max {self.worst:.3g} over {self.tokens} tokens"
        return f"{found}, {self.left_out} left out"


@dataclass
class Measured(Result):
    """Also how far the server with DCP, and plain tp 2, are from tp 1."""

    found: Distance = field(default_factory=Distance)
    spread: Distance = field(default_factory=Distance)


def specs(
    setting: Setting, flags: str = "", *, forced: bool = True
) -> tuple[Spec, Spec, Spec]:
    """The server with DCP, plain tp 1 and plain tp 2. `flags` go to all of them.

    Their tokens are `forced`, or sampled.
    """
    backend = re.findall(r"--attention-backend \S+", setting.layout)
    plain = f"--dtype bfloat16 --disable-prefill-cuda-graph {' '.join(backend)} {flags}"
    own = f"--max-total-tokens {setting.per_rank} --mem-fraction-static 0.7"
    plugin = teacher_forcing.PLUGIN if forced else teacher_forcing.NO_PLUGIN
    tested = f"--dtype bfloat16 {setting.flags} {flags}"
    tp2 = f"--tp 2 {plain} --enable-priority-scheduling"
    return (
        Spec("tested", setting.kind, tested, plugin, own),
        Spec("tp1", setting.kind, f"--tp 1 {plain}", plugin, POOL),
        Spec("tp2", setting.kind, tp2, plugin, POOL),
    )


@contextmanager
def live(wanted: Sequence[Spec], folder: Path) -> Iterator[list[ServerProcess]]:
    """All of these servers, ready. They start side by side.

    Their ranks share GPUs only where `SGLANG_DCP_TEST_RANKS_PER_GPU` allows it.
    """
    for spec in wanted:
        assert spec.can_run(), f"{spec.name} needs {spec.gpus} GPUs"
    with ExitStack() as stack:
        servers = [stack.enter_context(make_server(s, folder)) for s in wanted]
        for server in servers:
            server.wait_ready(READY_SECONDS)
        yield servers


async def drive(
    tested: Client, tp1: Client, tp2: Client, setting: Setting, mixes: Iterable[Mix]
) -> Measured:
    """Run all mixes. Raises `Lost` where a server no longer serves."""
    judge = Judge(setting.longest_prompt, math.inf)
    result = Measured(counts=judge.counts)
    for mix in mixes:
        want = await run_alone(tp1, mix, setting.longest_prompt)
        ((_, got, faults),) = await run_mixes(tested, setting, judge, [(mix, want)])
        result.mixes += 1
        result.found.add(mix.asks, got, want)
        result.spread.add(mix.asks, await tp2.run(mix), want)
        if faults:
            result.failed.append((mix, faults))
    return result
