"""The options that say which engines a benchmark starts, the same in each of them."""

from __future__ import annotations

import argparse

import torch

from decode_models import MODELS, Layout


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Model, ranks, layouts, attention backend and KV pool."""
    gpus = torch.cuda.device_count()
    add = parser.add_argument
    add("--model", choices=MODELS, help="default: one whose K/V heads are too few")
    add("--tp", type=int, default=gpus or 1, help="default: all GPUs")
    add("--layouts", type=Layout.parse, nargs="*", metavar="KVP:COMM[:q]")
    add("--page-size", type=int, default=64)
    add("--attention-backend", default="fa3")
    add("--kv-cache-dtype", default="auto")
    add("--mem-fraction", type=float, default=0.8)
    add("--max-total-tokens", type=int, help="of one rank's pool; default: what fits")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpus else "cpu")
