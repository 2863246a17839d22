"""The options that say which engines a benchmark starts, the same in each of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

import torch

from decode_layouts import Layout, default_layouts, impossible
from decode_models import MODELS, default_model, query_heads
from decode_quantization import PLAIN, QUANTIZATIONS, why_not


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Model, ranks, layouts, attention backend and KV pool."""
    gpus = torch.cuda.device_count()
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: one with fewer K/V heads than ranks")
    add("--tp", type=int, default=gpus or 1, help="ranks; default: all GPUs")
    add(
        "--layouts",
        type=Layout.parse,
        nargs="*",
        metavar="DCP:COMM[:q][@BACKEND]",
        help="size, comm backend, :q for replicated Q, @ another attention backend; or "
        "upstream:DCP for SGLang's own DCP, or tp for none",
    )
    add("--page-size", type=int, default=64, help="tokens of a KV page")
    add("--attention-backend", help="default: fa3, on a CPU torch_native")
    add("--kv-cache-dtype", default="auto")
    add("--quantization", choices=QUANTIZATIONS, help="of the weights; default: bf16")
    add("--mem-fraction", type=float, default=0.8, help="--mem-fraction-static")
    add("--max-total-tokens", type=int, help="of one rank's KV pool")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
    add(
        "--off-plugins",
        default="none",
        help="SGLANG_PLUGINS that leaves this package out",
    )


def fill_engine_defaults(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    defaults: Optional[int] = None,
) -> None:
    """Model, attention backend and layouts that were not named; exits for a bad one.

    `defaults` is how many of the default layouts are taken, the best ones; None is all.
    `options.plain` is plain tensor parallelism on the run's attention backend, and
    `options.weights` the format of the weights.
    """
    options.weights = options.quantization or PLAIN
    options.model = options.model or default_model(options.tp)
    if query_heads(options.model) % options.tp:
        parser.error(
            f"--tp {options.tp} does not divide the {query_heads(options.model)} query "
            f"heads of {options.model}"
        )
    if reason := why_not(options.quantization, options.model, options.tp):
        parser.error(reason)
    on_cpu = options.device == "cpu"
    if options.attention_backend is None:
        # SGLang's own choice on Hopper, and ours, for latents too.
        options.attention_backend = "torch_native" if on_cpu else "fa3"
    layouts = options.layouts
    if layouts is None:
        layouts = default_layouts(options.model, options.tp, options.device)[:defaults]
    for layout in layouts:
        reason = impossible(layout, options.model, options.tp, options.device)
        if reason:
            parser.error(reason)
    options.layouts = _resolved(options, layouts)
    [options.plain] = _resolved(options, [Layout()])


def _resolved(options: argparse.Namespace, layouts: Sequence[Layout]) -> list[Layout]:
    own = options.attention_backend
    return [layout.resolved(options.model, own) for layout in layouts]
