"""Layers of a model as far as `symm_a2a` goes: a gather and a reduce, on ever new data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.nccl_ranks import capture
from helpers.symm_cases import INF, NAN, Case, Data, wanted
from helpers.symm_sim import SimulatedRanks
from sglang_dcp.distributed.exchange import Exchange

Size = tuple[int, int, int]  # tokens, local heads, head dim
Result = tuple[Tensor, Tensor]  # all queries, merged local heads


class Layer(NamedTuple):
    """What one layer of all ranks exchanges."""

    outs: Tensor  # [N, tokens, N * heads, dim]
    lses: Tensor  # [N, tokens, N * heads]
    q: Tensor  # [N, tokens, heads, dim]

    def fill(self, generator: torch.Generator) -> None:
        for tensor in self:
            tensor.normal_(generator=generator)
        # Some shards, and some rows of all shards, hold no key.
        self.lses.masked_fill_(self.lses < -1.0, -INF)

    def call(self, exchange: Exchange, rank: int) -> Result:
        gathered = exchange.gather_heads(self.q[rank])
        state = self.outs[rank], self.lses[rank]
        return gathered, exchange.reduce(*state, is_lse_base_on_e=True)[0]

    def error(self, case: Case, rank: int, result: Result) -> Tensor:
        """Relative error of the merged heads; inf where a query differs."""
        gathered, merged = result
        ideal, _ = wanted(case, Data(self.outs, self.lses, None), rank)
        error = ((merged.double() - ideal).norm() / ideal.norm()).float()
        every = self.q.transpose(0, 1).flatten(1, 2)
        return error.masked_fill((gathered != every).any(), INF)


def case_of(world_size: int, size: Size) -> Case:
    return Case(world_size, *size, "bf16", "e", "dense", False)


def layer_of(world_size: int, size: Size) -> Layer:
    tokens, heads, dim = size
    more: Any = {"device": "cuda", "dtype": torch.bfloat16}
    all_heads = world_size, tokens, world_size * heads
    return Layer(
        torch.zeros(*all_heads, dim, **more),
        torch.zeros(all_heads, device="cuda"),
        torch.zeros(world_size, tokens, heads, dim, **more),
    )


class Step:
    """A layer of simulated ranks, eager or captured."""

    def __init__(self, ranks: SimulatedRanks, size: Size) -> None:
        self._case = case_of(ranks.world_size, size)
        self._layer = layer_of(ranks.world_size, size)
        self._ranks = ranks
        self._replay, self._results = ranks.capture(self._call)

    def _call(self, rank: int) -> Result:
        return self._layer.call(self._ranks.exchanges[rank], rank)

    def run(self, generator: torch.Generator, captured: bool) -> Tensor:
        """The largest error of any rank on new data."""
        self._layer.fill(generator)
        results = self._results
        if captured:
            for result in itertools.chain(*results):
                result.fill_(NAN)
            self._replay()
        else:
            results = self._ranks.all(self._call)
        errors = [
            self._layer.error(self._case, rank, result)
            for rank, result in enumerate(results)
        ]
        # max() keeps a NaN.
        return torch.stack(errors).max()


class Batch:
    """Two layers of a real rank, one after the other."""

    def __init__(self, group: Any, exchange: Exchange, size: Size) -> None:
        self._case = case_of(group.world_size, size)
        self._rank, self._exchange = group.rank_in_group, exchange
        self._layers = [layer_of(group.world_size, size) for _ in range(2)]

    def call(self) -> list[Result]:
        return [layer.call(self._exchange, self._rank) for layer in self._layers]

    def captured(self) -> Callable[[], list[Result]]:
        """Replays a graph of `call`."""
        graph, results = capture(self.call)

        def replay() -> list[Result]:
            for result in itertools.chain(*results):
                result.fill_(NAN)
            graph.replay()
            return results

        return replay

    def worst(
        self, generator: torch.Generator, run: Callable[[], list[Result]]
    ) -> Tensor:
        """The largest error of `run` on new data."""
        for layer in self._layers:
            layer.fill(generator)
        errors = [
            layer.error(self._case, self._rank, result)
            for layer, result in zip(self._layers, run())
        ]
        return torch.stack(errors).max()
