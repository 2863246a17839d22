"""Some requests of a prefill, against a walk over all tokens one by one."""

from __future__ import annotations

import itertools
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.layers.prefix.some_requests import rows_of, some_requests


def owners(lens: list[int]) -> list[int]:
    return [request for request, length in enumerate(lens) for _ in range(length)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_rows_and_the_other_rows_are_all_rows(count: int) -> None:
    """Each row is in one part, and both parts are in the order of the batch."""
    for lens in itertools.product((0, 1, 3), repeat=count):
        for taken in itertools.product((False, True), repeat=count):
            rows = rows_of(lens, taken)
            assert rows.dtype == torch.int64
            of = owners(list(lens))
            assert rows.tolist() == [r for r, owner in enumerate(of) if taken[owner]]
            others = rows_of(lens, [not one for one in taken])
            assert sorted([*rows.tolist(), *others.tolist()]) == list(range(len(of)))


def local_batch(new: list[int], held: list[int]) -> Any:
    """A local batch of a prefill; `held` counts the keys on this rank."""
    count = len(new)
    lens, tokens = torch.tensor(held), sum(new)
    return SimpleNamespace(
        batch_size=count,
        req_pool_indices=torch.arange(count) + 50,
        seq_lens=lens,
        seq_lens_cpu=lens.clone(),
        seq_lens_sum=sum(held),
        extend_seq_lens=torch.tensor(new),
        extend_seq_lens_cpu=new,
        extend_prefix_lens=lens,
        extend_prefix_lens_cpu=held,
        out_cache_loc=torch.arange(tokens) + 900,
        other="kept",
    )


def test_some_requests_are_a_local_batch_of_their_own() -> None:
    draw = random.Random(4)
    for _ in range(200):
        count = draw.randrange(1, 6)
        new = [draw.randrange(1, 5) for _ in range(count)]
        held = [draw.randrange(0, 3) for _ in range(count)]
        taken = [draw.random() < 0.5 for _ in range(count)]
        which = [number for number, one in enumerate(taken) if one]
        if not which:
            continue
        whole = local_batch(new, held)
        before = dict(vars(whole))
        rows, some, empty_rows = some_requests(whole, taken)
        assert vars(whole) == before
        assert some.other == "kept" and some.batch_size == len(which)
        assert some.req_pool_indices.tolist() == [50 + n for n in which]
        keys = [held[n] for n in which]
        for name in ("seq_lens", "seq_lens_cpu", "extend_prefix_lens"):
            assert getattr(some, name).tolist() == keys
        assert some.extend_prefix_lens_cpu == keys and some.seq_lens_sum == sum(keys)
        tokens = [new[n] for n in which]
        assert some.extend_seq_lens.tolist() == some.extend_seq_lens_cpu == tokens
        of = owners(new)
        mine = [row for row, owner in enumerate(of) if taken[owner]]
        assert rows.tolist() == mine
        assert some.out_cache_loc.tolist() == [900 + row for row in mine]
        empty = [held[of[row]] == 0 for row in mine]
        got = [False] * len(mine) if empty_rows is None else empty_rows.tolist()
        assert got == empty


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
