"""Accepted drafts of a trained pair on live servers, without and with DCP, in one run.

    python benchmark/distil_draft.py PAIR
    python benchmark/eval_draft.py results.json PAIR                    # on a CPU in fp32
    python benchmark/eval_draft.py results.json PAIR --layouts tp 2:a2a:q 2:ag_rs

A plain tp 1 server without speculation continues prompts greedily. Then each server of
`--layouts` (as in `bench_decode.py`; `tp` is plain TP) does it with the head's drafts. Prompts
are cut from chapters of the Python language reference on which the head was not trained
(`real_text.py`), and arrive at once.

A verification gives the drafts that are right and one token more. SGLang counts the
verifications of each request, and `head_oracle.py` tells how many there must be. SGLang's own
`spec_accept_length` also counts the token of the prefill.

It exits with 1 if a server fails, or if hardly any draft is right. On a CPU each reply must be
that of the server without speculation, and take as many verifications as by torch. In 16 bit
both part at near ties. There the mean accepted length must be `CLOSE` to plain TP's, in the
replies that both servers gave.

DCP refuses drafts on CPUs. The plugin of the live tests lets these servers start.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from accepted_report import Drafted, accepted, faults, table
from accuracy_report import FIRST
from decode_layouts import Layout
from distil_draft import STEPS
from doors import add_tests
from eval_accuracy import Size, server_flags
from head_oracle import HeadOracle
from live_servers import FAILURES, log_beside, say
from real_text import Ids, Sample, draw_sample, split_chapters
from sglang_dcp.demo.client import http_json
from speculation_door import open_door
from speculation_drafts import Speculation, flags_of

PROMPT_TOKENS = (64, 120, 200, 350, 500)
SPECULATION = Speculation(STEPS, STEPS + 1)


def ask(base_url: str, prompts: Sequence[Ids], new_tokens: int) -> list[Drafted]:
    """Let a server continue the prompts greedily, all at once."""
    greedy = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    payload = {"input_ids": prompts, "sampling_params": greedy}
    answers = http_json(f"{base_url}/generate", payload)
    return [drafted(answer) for answer in answers]


def drafted(answer: Mapping[str, Any]) -> Drafted:
    """Read a reply. Without speculation SGLang counts no verifications."""
    meta = answer["meta_info"]
    return Drafted(
        list(answer["output_ids"]),
        int(meta.get("spec_verify_ct", 0)),
        float(meta.get("spec_accept_length", 1.0)),
    )


def serve(
    options: argparse.Namespace, layout: Layout | None, sample: Sample, door: Path
) -> list[Drafted]:
    """Ask one server; None is plain tp 1, which does not speculate."""
    from helpers import shared_gpus

    name, flags, env, mps = FIRST, server_flags(options, layout), {}, None
    if layout:
        name = layout.name
        flags += flags_of(SPECULATION, "eagle3", options.draft)
        env = open_door(door, options.device, options.shared_by)
        if options.shared_by:
            mps = shared_gpus.Mps()
            flags += shared_gpus.FLAGS.split()
    with shared_gpus.SharingServer(
        options.target,
        flags,
        log_path=log_beside(options.json, name),
        env={**env, "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"},
        device=options.device,
        grace=0.0,
        mps=mps,
    ) as server:
        say(f"{name}: ready after {server.wait_ready(options.ready_s):.0f} s")
        replies = ask(server.base_url, sample.prompts, options.size.new_tokens)
    say(f"{name}: {accepted(replies):.4f} tokens of a verification")
    return replies


def serve_all(
    options: argparse.Namespace, sample: Sample, errors: list[str]
) -> dict[str, list[Drafted]]:
    """Replies by server name; a server that failed is named in `errors`."""
    found = {}
    with tempfile.TemporaryDirectory() as doors:
        for index, layout in enumerate((None, *options.layouts)):
            name = layout.name if layout else FIRST
            try:
                found[name] = serve(options, layout, sample, Path(doors) / str(index))
            except FAILURES as error:
                # The other servers are worth their time all the same.
                errors.append(f"{name}: {error}")
    return found


def expected(
    options: argparse.Namespace, sample: Sample, first: list[Drafted]
) -> list[int]:
    """How many verifications each reply of the first server takes, by torch."""
    oracle = HeadOracle(options.target, options.draft, STEPS)
    pairs = zip(sample.prompts, first)
    return [oracle.verifications(prompt, reply.ids) for prompt, reply in pairs]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("json", type=Path, help="where the replies go; server logs beside it")
    add("pair", type=Path, help="folder that distil_draft.py wrote")
    add("--device", choices=("cuda", "cpu"), default=device)
    add(
        "--tp",
        type=int,
        default=gpus or 2,
        help="default: all GPUs, on a CPU 2; more share",
    )
    add("--layouts", type=Layout.parse, nargs="+", metavar="DCP:COMM[:q][@BACKEND]")
    add("--attention-backend", help="default: fa3, on a CPU torch_native")
    add("--page-size", type=int, default=4)
    add("--chunk", type=int, default=256, help="--chunked-prefill-size")
    add("--ready-s", type=float, default=600.0, help="for a server to start")
    add("--prompts", type=int, default=16)
    add("--new-tokens", type=int, default=64)
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    add_tests()
    from helpers.shared_gpus import are_shared_by

    shares = not on_cpu and are_shared_by(options.tp)
    options.shared_by = options.tp if shares else 0
    options.json = options.json.absolute()
    options.target, options.draft = (
        (options.pair / name).absolute() for name in ("target", "draft")
    )
    options.layouts = options.layouts or [Layout.parse("tp"), Layout.parse("2:a2a:q")]
    if not on_cpu and all(layout.dcp_size > 1 for layout in options.layouts):
        parser.error(
            "--layouts: on GPUs plain TP (tp) is what others are compared with"
        )
    options.attention_backend = options.attention_backend or (
        "torch_native" if on_cpu else "fa3"
    )
    options.size = Size(0, 0, options.prompts, PROMPT_TOKENS, options.new_tokens)
    return options


def held_out_prompts(options: argparse.Namespace) -> Sample:
    from transformers import AutoTokenizer

    return draw_sample(
        AutoTokenizer.from_pretrained(options.target),
        texts=0,
        text_tokens=0,
        prompts=options.prompts,
        prompt_tokens=PROMPT_TOKENS,
        of=split_chapters()[1],
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []
    sample = held_out_prompts(options)
    found = serve_all(options, sample, errors)
    replies = {name: [one._asdict() for one in ones] for name, ones in found.items()}
    options.json.write_text(json.dumps({"text": sample.fingerprint, **replies}) + "\n")
    if FIRST in found:
        wanted = expected(options, sample, found[FIRST])
        exact = options.device == "cpu"
        errors += faults(found, options.layouts, wanted if exact else None)
        lengths = mean(map(len, sample.prompts))
        print(f"\n{sample.fingerprint}, {options.prompts} prompts of {lengths:.0f}")
        print(f"verifications by torch: {sum(wanted)}\n")
        plain = [found.get(one.name) for one in options.layouts if one.dcp_size == 1]
        print(table(found, None if exact else plain[0]))
    print("\n" + ("\n".join(errors) or "every server accepts what it should"))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
