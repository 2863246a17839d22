"""What `bench_speculation.py` asks for at once, and the slots of the KV pool that this takes."""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

from speculation_replies import output_tokens

# What each request adds to the prefix.
OWN_TOKENS = 16
# Rounds of replies that the pool has room for, beside the prefix: the tree keeps old ones.
ROUNDS_IN_POOL = 3


class Size(NamedTuple):
    """A batch of requests on one prefix of `context` tokens."""

    context: int
    batch: int


def tokens_of(options: argparse.Namespace, batch: int) -> int:
    """Slots that `batch` requests take beside their prefix, in whole pages."""
    accepted = max([1, *(draft.accepted for draft in options.drafts)])
    # A step reserves twice its rows, so that one may run ahead.
    rows = 2 * max([1, *(draft.steps + 1 for draft in options.drafts)])
    page = options.page_size * options.tp
    one = OWN_TOKENS + output_tokens(options.output_len, accepted) + rows
    return batch * (math.ceil(one / page) + 1) * page


def prefixes_of(options: argparse.Namespace, batch: int) -> int:
    """How many prefixes `batch` requests have."""
    return batch if options.own_prefixes else 1


def slots_of(options: argparse.Namespace, size: Size) -> int:
    """Slots of the whole pool that one round of `size` takes."""
    prefixes = prefixes_of(options, size.batch)
    return prefixes * size.context + tokens_of(options, size.batch)


def rank_pool(options: argparse.Namespace, dcp_size: int) -> int:
    """`--max-total-tokens` of a rank: what the largest size needs, or what was asked for."""
    if options.max_total_tokens:
        return int(options.max_total_tokens)
    largest = Size(max(options.contexts), max(options.batches))
    old = (ROUNDS_IN_POOL - 1) * tokens_of(options, largest.batch)
    page = options.page_size
    return math.ceil((slots_of(options, largest) + old) / dcp_size / page) * page
