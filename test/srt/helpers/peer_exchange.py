"""What peers would receive from each other, without a process group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang_dcp.ops import partials


def same_bits(actual: Tensor, wanted: Tensor) -> bool:
    bits = torch.int32 if wanted.element_size() == 4 else torch.int16
    pair = (tensor.contiguous().view(bits) for tensor in (actual, wanted))
    return actual.shape == wanted.shape and torch.equal(*pair)


def peers_of(rank: int, world_size: int) -> list[int]:
    return [peer for peer in range(world_size) if peer != rank]


def received_by(rank: int, sent: list[Tensor]) -> Tensor:
    """What `rank` gets if every rank p sends slice j of `sent[p]` to its j-th peer."""
    slices = [
        sent[peer][peers_of(peer, len(sent)).index(rank)]
        for peer in peers_of(rank, len(sent))
    ]
    return torch.stack(slices) if slices else sent[rank]


def heads_of(rank: int, local_heads: int) -> slice:
    return slice(rank * local_heads, (rank + 1) * local_heads)


def both_exchanges(
    outs: Tensor, lses: Tensor, rank: int, *, is_lse_base_on_e: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Merged state of `rank`'s heads, with the LSE packed and with the LSE gathered."""
    world_size = outs.shape[0]
    local_heads = outs.shape[2] // world_size
    heads, ranks = heads_of(rank, local_heads), range(world_size)
    sent = [partials.pack_partials(outs[p], lses[p], world_size, p) for p in ranks]
    own, own_lse = outs[rank, :, heads], lses[rank, :, heads]
    rows = received_by(rank, sent)
    yield partials.unpack_combine(
        rows, own, own_lse, rank, is_lse_base_on_e=is_lse_base_on_e
    )
    sent = [partials.slice_for_peers(outs[p], world_size, p) for p in ranks]
    rows, gathered = received_by(rank, sent), lses[:, :, heads]
    yield partials.combine_from_peers(
        rows, gathered, own, rank, is_lse_base_on_e=is_lse_base_on_e
    )
