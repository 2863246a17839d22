"""What each rank of a `symm_a2a` group checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from helpers import symm_cases as cases
from helpers.symm_build import (
    Defines,
    layer_variants,
    reduce_variant,
)
from helpers.symm_cases import Case
from helpers.symm_layers import Batch
from sglang_dcp.distributed.exchange import (
    A2AExchange,
    Exchange,
    WorkspaceSpec,
    create_exchange,
)

REPLAYS = 10_000


SPEC = WorkspaceSpec(tokens=64, heads=8, row_bytes=256, timeout_s=60.0)


# tokens, local heads, head dim
CAPTURED = ((8, 4, 128), (1, 4, 128), (33, 3, 96))


EAGER = ((5, 4, 128), (64, 8, 128))


OVERSIZED = (200, 8, 128)


def check_replays(group: Any, replays: int = REPLAYS) -> None:
    """No wait of the host in between: ranks run ahead of each other as they like."""
    exchange = create_exchange("symm_a2a", group, SPEC)
    assert exchange.in_use == "symm_a2a", exchange.fallbacks.counts
    batches = [Batch(group, exchange, size) for size in CAPTURED]
    graphs = [(batch, batch.captured()) for batch in batches]
    eager = [(b, b.call) for b in (Batch(group, exchange, size) for size in EAGER)]
    large = Batch(group, exchange, OVERSIZED)
    generator = torch.Generator("cuda").manual_seed(4)
    order = torch.randint(0, 3, (replays,), generator=torch.Generator().manual_seed(4))
    errors: list[Tensor] = []
    fallbacks: list[Any] = []
    by_a2a = A2AExchange._reduce

    def counted(*arguments: Any) -> Any:
        fallbacks.append(arguments[1].shape)
        return by_a2a(*arguments)

    with patch.object(A2AExchange, "_reduce", counted):
        for number, choice in enumerate(order.tolist()):
            runs = [graphs[choice]]
            if number % 3 == 0:
                runs.append(eager[number % 2])
            if number % 200 == 0:
                runs.append((large, large.call))
            if number % 7 == group.rank_in_group:
                # Cycles: some 100 us in which the others go ahead.
                torch.cuda._sleep(200_000)
            errors += [batch.worst(generator, run) for batch, run in runs]
    worst = torch.stack(errors).nan_to_num(nan=9e9)
    assert worst.max() < cases.ROUNDING["bf16"], (
        f"{(worst >= cases.ROUNDING['bf16']).sum().item()} of {len(errors)} runs, first "
        f"{(worst >= cases.ROUNDING['bf16']).int().argmax().item()}, {worst.max():.1e}"
    )
    # The oversized batches, two layers each, and nothing else.
    assert len(fallbacks) == 2 * -(-replays // 200)


def check_case(group: Any, case: Case) -> None:
    """Poison and empty shards over NVLink, as `test_symm_a2a_gpu` has them on one GPU."""
    rank, data = group.rank_in_group, cases.random_data(case, seed=6)
    empty = None if data.empty is None else data.empty[rank]
    out, lse = exchange_of(group).reduce(
        cases.arranged(data.outs[rank], case.layout),
        cases.arranged_lse(data.lses[rank], case.layout),
        empty_rows=empty,
        is_lse_base_on_e=case.base == "e",
    )
    ideal, ideal_lse = cases.wanted(case, data, rank)
    assert cases.relative_error(out, ideal) <= cases.ROUNDING[case.dtype]
    tol = cases.LSE_TOLERANCE
    torch.testing.assert_close(lse, ideal_lse.float(), rtol=tol, atol=tol)


_EXCHANGES: dict[int, Exchange] = {}


def exchange_of(group: Any) -> Exchange:
    """One for all cases, as a server has one for all layers."""
    if id(group) not in _EXCHANGES:
        spec = WorkspaceSpec(tokens=64, heads=32, row_bytes=2048, timeout_s=60.0)
        exchange = create_exchange("symm_a2a", group, spec)
        # Else a2a would be judged in its place.
        assert exchange.in_use == "symm_a2a", exchange.fallbacks.counts
        _EXCHANGES[id(group)] = exchange
    return _EXCHANGES[id(group)]


def cases_of(world_size: int) -> dict[str, Case]:
    """The cases of two simulated ranks, at this width."""
    found = [c for c in cases.reduce_cases().values() if c.world_size == 2]
    return {
        "reduce-T{1}-h{2}-D{3}-{4}-{5}-{6}-{7}".format(*c): c._replace(
            world_size=world_size
        )
        for c in found
        if c.tokens <= 64
    }


def variants(world_size: int, rank: int) -> Iterator[Defines]:
    """Of all kernels that a rank's `checks` launch."""
    for case in cases_of(world_size).values():
        yield reduce_variant(case, rank)
    yield from layer_variants(world_size, [rank], (*CAPTURED, *EAGER))


def check_nothing_missed(missed: list[Defines]) -> None:
    """Else ranks wait for each other's compilers."""
    assert missed == []


def checks(
    world_size: int, group: Any, missed: list[Defines]
) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, case in cases_of(world_size).items():
        yield name, partial(check_case, group, case)
    yield "replays", partial(check_replays, group)
    yield "all-were-compiled-before", partial(check_nothing_missed, missed)
