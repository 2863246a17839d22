"""``python -m sglang_dcp.demo``: the same prompts with and without DCP, token by token.

Serves a tiny random-weight model on CPU, first with its KV cache cut by position over
the ranks, then on one rank, and shows that tokens and log-probabilities agree. It
shows that DCP is exact and what it stores, not how fast it is.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sglang_dcp.demo.client import Reply, compare, http_json
from sglang_dcp.demo.server import ServerFailed, ServerProcess
from sglang_dcp.demo.tiny_model import KINDS, make_tiny_model

TOLERANCE = 1e-3
# Of one rank. The long prompt does not fit into it, and fits into two ranks.
POOL_TOKENS = 4096
LONG_PROMPT_TOKENS = 5000


@dataclass(frozen=True)
class Prompt:
    """One request of the demo."""

    name: str
    text: str
    max_tokens: int
    stream: bool = False


@dataclass(frozen=True)
class Answer:
    """What one server said; a token's text stands for its id (one character each)."""

    tokens: list[str]
    logprobs: list[float]
    prompt_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One server: how it was cut, its answers, and the KV tokens it says it can hold."""

    label: str
    dcp_size: int
    capacity: int
    answers: list[Answer]


@dataclass
class Progress:
    """One line that counts seconds on a terminal, one line in ten seconds elsewhere."""

    label: str
    _next: float = field(default=0.0, init=False)

    def __call__(self, seconds: float) -> None:
        if sys.stdout.isatty():
            print(f"\r{self.label} ... {seconds:3.0f} s", end="", flush=True)
        elif seconds >= self._next:
            print(f"{self.label} ... {seconds:.0f} s", flush=True)
            self._next += 10.0

    def done(self, seconds: float) -> None:
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{self.label}: ready in {seconds:.0f} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if every answer agrees, 1 if not, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        return _demo(options)
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; no server is left running", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_dcp.demo",
        description="Serve a tiny model with and without DCP and compare every token.",
    )
    parser.add_argument("--cache-dir", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--model", choices=list(KINDS), default="llama-1kv")
    parser.add_argument("--tp", type=int, default=2, help="ranks of the DCP server")
    parser.add_argument("--dcp-size", type=int, default=2, help="1: no DCP flags")
    parser.add_argument("--dcp-comm-backend", default="a2a")
    parser.add_argument("--reference-tp", type=int, default=1)
    return parser


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception it unwinds through ServerProcess, which takes the server down.
    raise SystemExit(128 + number)


def _demo(options: argparse.Namespace) -> int:
    cache: Path = options.cache_dir
    print("Two servers start one after the other; on 2 idle cores it takes 2 minutes.")
    print(f"model: {options.model}, random weights, float32, CPU", flush=True)
    model = make_tiny_model(cache / "models" / options.model, options.model)
    dcp_size: int = options.dcp_size
    flags = ["--tp", str(options.tp), "--max-total-tokens", str(POOL_TOKENS)]
    label = f"tp {options.tp}"
    if dcp_size > 1:
        flags += ["--dcp-size", str(dcp_size)]
        flags += ["--dcp-comm-backend", options.dcp_comm_backend]
        label += f" dcp {dcp_size}"
    else:
        flags[-1] = str(2 * POOL_TOKENS)
    plain = ["--tp", str(options.reference_tp)]
    plain += ["--max-total-tokens", str(2 * POOL_TOKENS)]
    logs = cache / "logs"
    first = _run(label, dcp_size, model, flags, logs / "dcp.log")
    second = _run(f"tp {options.reference_tp}", 1, model, plain, logs / "reference.log")
    print(f"\n{_copies(options.model, options.tp, dcp_size)}")
    return _report(first, second)


def _prompts() -> list[Prompt]:
    lines = (f"Position {p} lives on rank {p % 2}. " for p in range(1, 1000))
    long_text = "".join(lines)[:LONG_PROMPT_TOKENS]
    return [
        Prompt("short", "Hello", 16),
        Prompt("streamed", "Where does position 7 live? ", 48, stream=True),
        Prompt("long", long_text, 24),
        Prompt("long again", long_text, 24),
    ]


def _run(
    label: str, dcp_size: int, model: Path, flags: Sequence[str], log: Path
) -> Run:
    common = ["--dtype", "float32", "--random-seed", "0", "--enable-cache-report"]
    common += ["--chunked-prefill-size", "1024", "--max-running-requests", "16"]
    # SGLang's choice for a CPU without AMX also asks for CUDA graphs, and fails.
    common += ["--attention-backend", "torch_native"]
    progress = Progress(f"server {label}")
    with ServerProcess(model, [*common, *flags], log_path=log) as server:
        print(f"\n$ {shlex.join(server.command)}\n  log: {log}", flush=True)
        progress.done(server.wait_ready(on_tick=progress))
        answers = _ask_all(server.base_url, _prompts())
        info = http_json(f"{server.base_url}/server_info")
    return Run(label, dcp_size, int(info["max_total_num_tokens"]), answers)


def _ask_all(base_url: str, prompts: Sequence[Prompt]) -> list[Answer]:
    import httpx
    import openai

    # Without the environment's proxies: the server listens on this machine only.
    with httpx.Client(trust_env=False, timeout=600) as http:
        client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", http_client=http, max_retries=0
        )
        return [_ask(client, prompt) for prompt in prompts]


def _ask(client: Any, prompt: Prompt) -> Answer:
    begin = time.monotonic()
    reply = client.completions.create(
        model="default",
        prompt=prompt.text,
        max_tokens=prompt.max_tokens,
        temperature=0,
        logprobs=1,
        stream=prompt.stream,
        stream_options={"include_usage": True} if prompt.stream else None,
        extra_body={"ignore_eos": True},
    )
    tokens: list[str] = []
    logprobs: list[float] = []
    usage: Any = None
    for part in reply if prompt.stream else [reply]:
        usage = part.usage or usage
        for choice in part.choices:
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens
                logprobs += choice.logprobs.token_logprobs
    details = usage.prompt_tokens_details
    return Answer(
        tokens,
        logprobs,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        seconds=time.monotonic() - begin,
    )


def _report(first: Run, second: Run) -> int:
    header = ["prompt", "tokens", "cached", f"s {first.label}", f"s {second.label}"]
    # No server of the last column ran: plain tensor parallelism stores every token.
    header += ["same", "max |d logp|", "KV/rank", "KV/rank without DCP (computed)"]
    rows = [header]
    failures = 0
    for prompt, one, two in zip(_prompts(), first.answers, second.answers):
        gap = compare(_as_reply(one), _as_reply(two))
        same = gap.equal_ids and gap.max_abs_logprob_diff < TOLERANCE
        same = same and len(one.tokens) == prompt.max_tokens
        failures += not same
        total = one.prompt_tokens + len(one.tokens)
        row = [prompt.name, f"{one.prompt_tokens}+{len(one.tokens)}"]
        row += [str(one.cached_tokens), f"{one.seconds:.1f}", f"{two.seconds:.1f}"]
        row += ["yes" if same else "NO", f"{gap.max_abs_logprob_diff:.1e}"]
        row += [str(-(-total // first.dcp_size)), str(total)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    print(f"\n{_capacity(first)}\n{_capacity(second)}")
    print("every token agrees" if not failures else f"{failures} prompts differ")
    return 1 if failures else 0


def _as_reply(answer: Answer) -> Reply:
    return Reply([ord(t) for t in answer.tokens], answer.logprobs)


def _copies(kind: str, tp: int, dcp_size: int) -> str:
    """How often one K/V value is stored, by the sharding rule for K/V heads."""
    heads = KINDS[kind].kv_heads
    alone = max(1, tp // heads)
    cut = max(1, tp // dcp_size // heads)
    return (
        f"K/V heads: {heads}; of {tp} ranks, those that store the same K/V value: "
        f"{alone} by tensor parallelism alone, {cut} at dcp {dcp_size}"
    )


def _capacity(run: Run) -> str:
    per_rank = run.capacity // run.dcp_size
    return f"{run.label}: room for {run.capacity} tokens, {per_rank} on each rank"


if __name__ == "__main__":
    sys.exit(main())
