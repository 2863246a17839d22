"""Query tokens over all small sizes, against loops over positions.

Only this file sees, for every rank and size, that the keys that query token j sees on all
ranks together are the positions 0 to H + j, each of them once. Live ranks see few sizes.
"""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from helpers.needs_sglang import needs_sglang
from sglang_dcp.layers.backends.triton import TritonBackend
from sglang_dcp.layers.decode_rows import (
    as_chains,
    as_draft_step,
    as_prefill_rows,
)
from sglang_dcp.layers.local_batch import LocalBatchBuilder
from sglang_dcp.ops.query_rows import (
    chain_mask,
    draft_step_lens,
    draft_step_slots,
    folding_of,
)

SIZES = range(1, 6)
WIDTHS = range(1, 8)
COMMITTED = (0, 1, 2, 3, 7, 11, 12)
PAGES = (1, 4)


def forward_mode(name: str) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return ForwardMode[name]


def slot_table(requests: int, positions: int, page: int) -> torch.Tensor:
    """Slots of shuffled logical pages, by row and position. Page 0 is SGLang's dummy."""
    gen = torch.Generator().manual_seed(requests + page)
    each = -(-positions // page)
    pages = 1 + torch.randperm(requests * each, generator=gen).view(requests, each, 1)
    return (pages * page + torch.arange(page)).view(requests, -1)[:, :positions].int()


def make_batch(mode: str, width: int, table: torch.Tensor) -> Any:
    """A speculative batch in SGLang's fields. Rows are in another order than requests."""
    rows = torch.arange(len(COMMITTED)).flip(0)
    lens = torch.tensor(COMMITTED)
    slots = [
        table[row, start : start + width]
        for row, start in zip(rows.tolist(), lens.tolist())
    ]
    counted = lens + width if mode == "DRAFT_EXTEND_V2" else lens
    return SimpleNamespace(
        forward_mode=forward_mode(mode),
        batch_size=len(COMMITTED),
        req_pool_indices=rows,
        seq_lens=counted,
        seq_lens_cpu=counted.clone(),
        seq_lens_sum=int(counted.sum()),
        out_cache_loc=torch.cat(slots).long(),
        positions=(lens[:, None] + torch.arange(width)).flatten(),
        spec_info=SimpleNamespace(num_tokens_per_req=width),
    )


def keys_of(
    builder: LocalBatchBuilder, local: Any, row: int, dcp_size: int, dcp_rank: int
) -> list[int]:
    """Logical slots of the keys that a row of a local batch reads on its rank."""
    where = builder.local_table[local.req_pool_indices[row], : local.seq_lens[row]]
    return (where * dcp_size + dcp_rank).tolist()


@pytest.mark.parametrize("mode", ["TARGET_VERIFY", "DRAFT_EXTEND_V2"])
@pytest.mark.parametrize("dcp_size", SIZES, ids=lambda n: f"dcp{n}")
def test_token_j_sees_the_keys_up_to_its_own_on_all_ranks_together(
    dcp_size: int, mode: str
) -> None:
    """Committed keys on the ranks, and those of the chain's tokens before it."""
    for width, page in itertools.product(WIDTHS, PAGES):
        positions = max(COMMITTED) + width
        table = slot_table(len(COMMITTED), positions, page * dcp_size)
        batch = make_batch(mode, width, table)
        found: list[list[int]] = [[] for _ in COMMITTED]
        for rank in range(dcp_size):
            builder = LocalBatchBuilder(table, dcp_size, rank, page)
            built = builder.build(*as_chains(batch))
            local = built.forward_batch
            assert torch.equal(local.seq_lens, local.seq_lens_cpu)
            assert built.width == width
            for row, keys in enumerate(found):
                keys += keys_of(builder, local, row, dcp_size, rank)
        chain = chain_mask(1, width)[0].tolist() if width > 1 else [[False]]
        for request, committed in enumerate(COMMITTED):
            slots = table[batch.req_pool_indices[request]].tolist()
            for j in range(width):
                new = [i for i in range(width) if chain[j][i]]
                seen = found[request] + [slots[committed + i] for i in new]
                assert sorted(seen) == sorted(slots[: committed + j + 1])


@pytest.mark.parametrize("dcp_size", SIZES, ids=lambda n: f"dcp{n}")
def test_every_query_token_is_written_once_and_read_by_later_forwards_alone(
    dcp_size: int,
) -> None:
    for width, page in itertools.product(range(2, 8), PAGES):
        table = slot_table(len(COMMITTED), max(COMMITTED) + width, page * dcp_size)
        batch = make_batch("TARGET_VERIFY", width, table)
        for rank in range(dcp_size):
            builder = LocalBatchBuilder(table, dcp_size, rank, page)
            built = builder.build(*as_chains(batch))
            written = built.forward_batch.out_cache_loc.tolist()
            assert len(written) == len(built.empty_rows) == width * len(COMMITTED)
            for token, slot in enumerate(batch.out_cache_loc.tolist()):
                own = slot % dcp_size == rank
                assert (written[token] >= page) == own
                row = token // width
                keys = keys_of(builder, built.forward_batch, row, dcp_size, rank)
                assert slot not in keys
                assert bool(built.empty_rows[token]) == (not keys)


@pytest.mark.parametrize("dcp_size", SIZES, ids=lambda n: f"dcp{n}")
def test_draft_step_sees_its_own_position_and_none_behind_it(dcp_size: int) -> None:
    steps = 3
    for page in PAGES:
        table = slot_table(len(COMMITTED), max(COMMITTED) + steps, page * dcp_size)
        batch = make_batch("TARGET_VERIFY", steps, table)
        for step in range(steps):
            one = as_draft_step(batch, step)
            found: list[list[int]] = [[] for _ in COMMITTED]
            for rank in range(dcp_size):
                builder = LocalBatchBuilder(table, dcp_size, rank, page)
                local = builder.build(one).forward_batch
                for row, keys in enumerate(found):
                    keys += keys_of(builder, local, row, dcp_size, rank)
            for request, committed in enumerate(COMMITTED):
                slots = table[batch.req_pool_indices[request]].tolist()
                assert sorted(found[request]) == sorted(slots[: committed + step + 1])
                assert one.out_cache_loc[request] == slots[committed + step]


# New tokens of a prefill over `COMMITTED` tokens: ragged, and requests of one token.
NEW = (3, 1, 5, 2, 1, 4, 7)


def make_prefill(table: torch.Tensor) -> Any:
    rows = torch.arange(len(COMMITTED)).flip(0)
    prefix, new = torch.tensor(COMMITTED), torch.tensor(NEW)
    slots = [
        table[row, start : start + count]
        for row, start, count in zip(rows.tolist(), COMMITTED, NEW)
    ]
    return SimpleNamespace(
        forward_mode=forward_mode("EXTEND"),
        batch_size=len(NEW),
        req_pool_indices=rows,
        seq_lens=prefix + new,
        seq_lens_cpu=prefix + new,
        seq_lens_sum=sum(COMMITTED) + sum(NEW),
        extend_seq_lens=new.int(),
        extend_seq_lens_cpu=list(NEW),
        extend_prefix_lens=prefix.int(),
        extend_prefix_lens_cpu=list(COMMITTED),
        out_cache_loc=torch.cat(slots).long(),
        spec_info=None,
    )


@pytest.mark.parametrize("dcp_size", SIZES, ids=lambda n: f"dcp{n}")
def test_row_of_a_prefill_sees_the_keys_up_to_its_own(dcp_size: int) -> None:
    for page in PAGES:
        table = slot_table(len(COMMITTED), 20, page * dcp_size)
        batch = make_prefill(table)
        found: list[list[int]] = [[] for _ in range(sum(NEW))]
        for rank in range(dcp_size):
            builder = LocalBatchBuilder(table, dcp_size, rank, page)
            built = builder.build(as_prefill_rows(batch))
            local, written = built.forward_batch, built.forward_batch.out_cache_loc
            assert local.forward_mode.is_decode() and len(written) == sum(NEW)
            assert torch.equal(local.seq_lens, local.seq_lens_cpu)
            for row, keys in enumerate(found):
                own = keys_of(builder, local, row, dcp_size, rank)
                slot = int(batch.out_cache_loc[row])
                assert (slot in own) == (slot % dcp_size == rank)
                assert (int(written[row]) >= page) == (slot % dcp_size == rank)
                keys += own
        wanted = [
            sorted(table[row, : start + j + 1].tolist())
            for row, start, count in zip(
                batch.req_pool_indices.tolist(), COMMITTED, NEW
            )
            for j in range(count)
        ]
        assert [sorted(keys) for keys in found] == wanted


def test_draft_steps_lie_request_after_request() -> None:
    lens = torch.tensor([5, 0], dtype=torch.int32)
    assert draft_step_lens(lens, 2).tolist() == [8, 3]
    assert draft_step_slots(torch.arange(6), 2, 1).tolist() == [1, 4]


@pytest.mark.parametrize("tile", [None, 16])
def test_query_tokens_become_heads_of_their_kv_head(tile: Optional[int]) -> None:
    for width, kv_heads, group in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 4, 6)):
        folding = folding_of(width, kv_heads * group, kv_heads, tile)
        requests = 3
        shape = (requests * width, kv_heads * group)
        # Each row says which request, token, K/V head and place in its group it is.
        marks = torch.cartesian_prod(
            *map(torch.arange, (requests, width, kv_heads, group))
        )
        rows = marks.view(*shape, 4)
        folded = folding.fold(rows)
        assert folded.shape == (requests, folding.heads, 4)
        per_kv = folded.view(requests, kv_heads, folding.padded, 4)
        for request, kv in itertools.product(range(requests), range(kv_heads)):
            real = per_kv[request, kv, : width * group]
            wanted = itertools.product([request], range(width), [kv], range(group))
            assert [tuple(row) for row in real.tolist()] == list(wanted)
        assert torch.equal(folding.unfold(folded), rows)
        assert torch.equal(folding.unfold(folded[..., 0]), rows[..., 0])
        if tile and kv_heads > 1 and width > 1:
            assert folding.padded <= tile or folding.padded % tile == 0


@needs_sglang("0.5.23", "speculation needs SGLang 0.5.23")
def test_the_tile_of_triton_is_that_of_its_kernel() -> None:
    """A tile of heads of two K/V heads would read the keys of one."""
    pytest.importorskip("triton", reason="needs triton")
    from sglang.kernels.ops.attention.decode_attention import _GROUPED_BLOCK_H

    assert TritonBackend.head_tile == _GROUPED_BLOCK_H


def test_folding_copies_nothing_with_one_kv_head() -> None:
    rows = torch.zeros(6, 4, 8)
    folded = folding_of(3, 4, 1).fold(rows)
    assert folded.data_ptr() == rows.data_ptr() and folded.is_contiguous()


def test_chain_mask_lets_a_token_see_those_before_it() -> None:
    mask = chain_mask(2, 4)
    assert mask.shape == (2, 4, 4)
    for i, j in itertools.product(range(4), range(4)):
        assert mask[:, i, j].tolist() == [j <= i] * 2


@pytest.mark.parametrize("mode", ["DECODE", "EXTEND", "MIXED"])
def test_other_forwards_stay_as_they_are(mode: str) -> None:
    batch: Any = SimpleNamespace(forward_mode=forward_mode(mode))
    found, width = as_chains(batch)
    assert found is batch and width == 1


def test_a_chain_of_one_token_is_a_decode_step() -> None:
    batch = make_batch("TARGET_VERIFY", 1, slot_table(len(COMMITTED), 20, 4))
    step, width = as_chains(batch)
    assert width == 1 and step.forward_mode.is_decode()
    assert step.seq_lens.tolist() == [n + 1 for n in COMMITTED]


def test_sglangs_batch_is_not_changed() -> None:
    batch = make_batch("DRAFT_EXTEND_V2", 3, slot_table(len(COMMITTED), 20, 4))
    before = dict(vars(batch))
    step, width = as_chains(batch)
    assert vars(batch) == before
    assert step.forward_mode.is_decode() and step.spec_info is None
    assert step.batch_size == len(COMMITTED) and width == 3
    # SGLang's FlashInfer backend makes captured plans for as many requests.
    assert step.positions.tolist() == list(COMMITTED)
    assert len(step.out_cache_loc) == 3 * len(COMMITTED)
    assert step.seq_lens.tolist() == list(COMMITTED)
    assert step.seq_lens_sum == sum(COMMITTED)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
