"""The pairs of servers that mixes are sent to: one with DCP, and a reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fuzz.mixes import Limits
from helpers.doors import with_door
from helpers.servers import READY_SECONDS, launched, plugin_folder
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

# SGLang's leak check at idle is on by default, this one after every batch is not.
CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
# It holds every request of a mix alone. Without a radix cache nothing is left over.
REFERENCE = (
    "--tp 1 --attention-backend torch_native --max-total-tokens 8192 "
    "--disable-radix-cache --disable-overlap-schedule"
)
# A rank tells its numbers; requests are admitted beyond what the pool can hold.
PRESSURE = (
    "--enable-metrics --enable-metrics-for-all-schedulers "
    "--enable-priority-scheduling --schedule-conservativeness 0.05"
)


@dataclass(frozen=True)
class Setting:
    """A server under test.

    Attributes
    ----------
    layout : str
        Its tensor-parallel and DCP flags.
    per_rank : int
        KV tokens of a rank. So small that mixes fill the pool.
    page_size : int
        Tokens of a rank's page.
    door : str
        A module of `helpers` that opens a door of DCP in the server's processes.
    """

    kind: str
    layout: str
    more: str = ""
    per_rank: int = 64
    page_size: int = 1
    dcp_size: int = 2
    ranks: int = 2
    door: str = ""

    @property
    def longest_prompt(self) -> int:
        """Below the pool without its last two pages, and below SGLang's own bound."""
        page = self.page_size * self.dcp_size
        pool = self.per_rank // self.page_size * page
        own = pool - 6
        return (own if self.dcp_size == 1 else min(own, pool - 2 * page)) - 1

    @property
    def flags(self) -> str:
        return (
            f"{self.layout} {self.more} {PRESSURE} --page-size {self.page_size} "
            f"--max-total-tokens {self.per_rank}"
        )

    def limits(self, grammar: bool = True) -> Limits:
        """What mixes for this server may hold.

        With the overlap scheduler SGLang's penalties lag behind by a token or none, as
        the batches come. So they are drawn without it only.
        """
        penalties = "--disable-overlap-schedule" in self.more
        return Limits(self.longest_prompt, grammar=grammar, penalties=penalties)


SETTINGS: Mapping[str, Setting] = {
    "llama-a2a-page1-mixed": Setting(
        "llama-2kv",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend a2a",
        "--chunked-prefill-size 16 --enable-mixed-chunk",
    ),
    "llama-ag_rs-page4-replicated": Setting(
        "llama-8kv",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend ag_rs --dcp-replicate-q-proj",
        "--chunked-prefill-size 32",
        page_size=4,
    ),
    "mla-ag_rs-page4-mixed-no-overlap": Setting(
        "mla-moe",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend ag_rs",
        "--chunked-prefill-size 32 --enable-mixed-chunk --disable-overlap-schedule",
        page_size=4,
    ),
    "mla-a2a-page16": Setting(
        "mla-v3",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        "--chunked-prefill-size 64",
        per_rank=96,
        page_size=16,
    ),
    "llama-tp4-attn2-a2a-page4-mixed": Setting(
        "llama-2kv",
        "--tp-size 4 --attn-tp-size 2 --dcp-comm-backend a2a",
        "--chunked-prefill-size 32 --enable-mixed-chunk",
        page_size=4,
        ranks=4,
    ),
    "llama-ag_rs-no-radix-no-overlap": Setting(
        "llama-2kv",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend ag_rs",
        "--disable-radix-cache --disable-overlap-schedule --chunked-prefill-size 16",
    ),
    "llama-a2a-page4-mixed-steps": Setting(
        "llama-8kv",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend a2a --dcp-replicate-q-proj",
        "--chunked-prefill-size 32 --enable-mixed-chunk",
        page_size=4,
        door="short_prefill_door",
    ),
    "mla-ag_rs-page1-chains": Setting(
        "mla-moe",
        "--tp-size 2 --dcp-size 2 --dcp-comm-backend ag_rs",
        "--chunked-prefill-size 16",
        door="chain_steps_door",
    ),
    # Not ours: what a mix does here, SGLang does by itself.
    "plain-tp2": Setting(
        "llama-2kv",
        "--tp-size 2 --attention-backend torch_native",
        "--chunked-prefill-size 16 --enable-mixed-chunk",
        per_rank=128,
        dcp_size=1,
    ),
}


@contextmanager
def live(
    kind: str, commands: Sequence[str], folder: Path, door: str = ""
) -> Iterator[list[ServerProcess]]:
    """Servers of one model with these flags, ready. They start side by side.

    The first one, which is under test, opens `door`.
    """
    model = make_tiny_model(folder / "models" / kind, kind)
    with ExitStack() as stack:
        env = {**CHECKS, **(stack.enter_context(_opened(door)) if door else {})}
        envs = [env, *[CHECKS] * (len(commands) - 1)]
        running = [
            stack.enter_context(launched(model, flags, env))
            for flags, env in zip(commands, envs)
        ]
        for server in running:
            server.wait_ready(READY_SECONDS)
        yield running


@contextmanager
def _opened(door: str) -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory() as plugins:
        source = with_door("def load(): ...\n", door)
        yield plugin_folder(Path(plugins), "fuzz_door", source)


def process_id(server: ServerProcess) -> int:
    """Id of the server's first process."""
    process = server._process
    assert process is not None
    return process.pid
