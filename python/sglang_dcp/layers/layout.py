"""The owner rule as index math: which rank holds a position, and where.

Position p of a request belongs to KVP rank `p % dcp_size` and is its `p // dcp_size`-th.
A logical page is `dcp_size` aligned runs of the pool, so a slot obeys the same rule as
the position that it holds: `slot % dcp_size` owns it, at local slot `slot // dcp_size`.

Pure: takes sizes and ranks, knows no process. Lengths and slots come back untouched at
`dcp_size` 1.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch

IntOrTensor = TypeVar("IntOrTensor", int, torch.Tensor)

# SGLang keeps the first page for writes of padding: nothing reads it.
DUMMY_SLOT = 0


def local_lens(lens: IntOrTensor, dcp_size: int, kvp_rank: int) -> IntOrTensor:
    """Positions below `lens` that `kvp_rank` owns; same type, dtype and shape."""
    if dcp_size == 1:
        return lens
    return (lens + (dcp_size - 1 - kvp_rank)) // dcp_size


def local_slots(
    slots: torch.Tensor, dcp_size: int, kvp_rank: int, page_size: int
) -> torch.Tensor:
    """Where `kvp_rank` writes tokens: its own slot, or one of the first page if not the owner.

    Of that page the same place as in the slot's own: thousands of writes to one slot
    would wait for each other. `page_size` is the pool's. The shape does not depend on
    ownership, so the result may feed a captured graph.
    """
    if dcp_size == 1:
        return slots
    owned = slots % dcp_size == kvp_rank
    places = slots // dcp_size
    return torch.where(owned, places, places % page_size)


def refresh_local_table(
    local: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lens: torch.Tensor,
    dcp_size: int,
    kvp_rank: int,
) -> None:
    """Rewrite `rows` of the local slot table from SGLang's, each up to its own length.

    Needed before every forward: the scheduler replaces slots of a request by those of
    the radix tree between its last prefill chunk and its first decode.

    Parameters
    ----------
    local : Tensor [requests, >= ceil(longest / dcp_size)]
        Written in place: `local[row, j] = table[row, j * dcp_size + kvp_rank] // dcp_size`.
    table : Tensor [requests, positions]
        SGLang's `req_to_token`, logical slots.
    rows : Tensor [batch]
        Request rows of this batch; padding may repeat one, and then writes it twice.
    lens : Tensor [batch]
        Logical lengths.
    """
    for row, length in zip(rows.tolist(), lens.tolist()):
        owned = table[row, kvp_rank:length:dcp_size]
        local[row, : len(owned)] = owned // dcp_size


def own_kv_heads(own_q: int, local_kv: int, dcp_size: int, kvp_rank: int) -> list[int]:
    """Local K/V head that each of a rank's own query heads attends with.

    Parameters
    ----------
    own_q : int
        Query heads of one tensor-parallel rank.
    local_kv : int
        K/V heads of one attn_tp shard, shared by the `dcp_size` ranks of a KVP group.

    Returns
    -------
    list of int
        One entry per own query head, non-decreasing.
    """
    group = own_q * dcp_size // local_kv
    return [(kvp_rank * own_q + head) // group for head in range(own_q)]


@cache
def own_kv_index(
    own_q: int, local_kv: int, dcp_size: int, kvp_rank: int, device: torch.device
) -> slice | torch.Tensor:
    """Index of `own_kv_heads` into [tokens, `local_kv`, dim], for a kernel in GQA ratio.

    Own heads that start amid a K/V head have no one ratio: then one copy a head, by an
    index tensor on `device` that callers share.
    """
    heads = own_kv_heads(own_q, local_kv, dcp_size, kvp_rank)
    first, last = heads[0], heads[-1]
    even = len({heads.count(head) for head in range(first, last + 1)}) == 1
    return slice(first, last + 1) if even else torch.tensor(heads, device=device)
