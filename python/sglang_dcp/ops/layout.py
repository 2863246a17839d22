"""The owner rule as index math: which rank holds a position, and at which local index.

Position p of a request belongs to DCP rank `p % dcp_size`. It is the
(`p // dcp_size`)-th position there. A logical page is `dcp_size` aligned runs of the
pool, so a slot obeys the same rule as the position in it. Rank `slot % dcp_size` owns
the slot, as its local slot `slot // dcp_size`.

The functions are pure: sizes and ranks are arguments. With `dcp_size` 1, lengths and
slots come back untouched.
"""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import torch

IntOrTensor = TypeVar("IntOrTensor", int, torch.Tensor)

# SGLang writes the K/V of padding to the first page, which nothing reads.
DUMMY_SLOT = 0


def local_lens(lens: IntOrTensor, dcp_size: int, dcp_rank: int) -> IntOrTensor:
    """Count the positions below `lens` that `dcp_rank` owns.

    The result has the type, dtype and shape of `lens`.
    """
    if dcp_size == 1:
        return lens
    return (lens + (dcp_size - 1 - dcp_rank)) // dcp_size


def local_slots(
    slots: torch.Tensor, dcp_size: int, dcp_rank: int, page_size: int
) -> torch.Tensor:
    """Map logical slots to the local slots that `dcp_rank` writes.

    A slot that another rank owns maps to the dummy page, at the same offset as in its
    page. If all of them mapped to one dummy slot, thousands of writes would wait for
    each other. Safe in CUDA-graph capture: the shape does not depend on ownership.

    Parameters
    ----------
    slots : Tensor of int, any shape
        Logical slots.
    page_size : int
        Tokens of a page in the rank's pool.

    Returns
    -------
    Tensor
        Shape and dtype of `slots`.
    """
    if dcp_size == 1:
        return slots
    owned = slots % dcp_size == dcp_rank
    places = slots // dcp_size
    return torch.where(owned, places, places % page_size)


def refresh_local_table(
    local: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    lens: torch.Tensor,
    dcp_size: int,
    dcp_rank: int,
) -> None:
    """Rewrite `rows` of the local slot table from SGLang's, each up to its length.

    Every forward needs it. Between a request's last prefill chunk and its first decode,
    the scheduler replaces the request's slots by those of the radix tree. Not safe in
    CUDA-graph capture: it reads `rows` and `lens` on the host.

    Parameters
    ----------
    local : Tensor [requests, >= ceil(longest / dcp_size)]
        Written in place: `local[row, j] = table[row, j * dcp_size + dcp_rank] // dcp_size`.
    table : Tensor [requests, positions]
        SGLang's `req_to_token`, logical slots.
    rows : Tensor [batch]
        Request rows of this batch. Padding may repeat a row, which is then written twice.
    lens : Tensor [batch]
        Logical lengths.
    """
    for row, length in zip(rows.tolist(), lens.tolist()):
        owned = table[row, dcp_rank:length:dcp_size]
        local[row, : len(owned)] = owned // dcp_size


def kv_heads_of_local_q(
    own_q: int, local_kv: int, dcp_size: int, dcp_rank: int
) -> list[int]:
    """Return the K/V head that serves each local query head of a rank.

    Parameters
    ----------
    own_q : int
        Local query heads, those of one tensor-parallel rank.
    local_kv : int
        K/V heads of one attn_tp shard. All ranks of a DCP group hold these.

    Returns
    -------
    list of int
        Index into the `local_kv` heads for each local query head, non-decreasing.
    """
    group = own_q * dcp_size // local_kv
    return [(dcp_rank * own_q + head) // group for head in range(own_q)]


@cache
def kv_index_of_local_q(
    own_q: int, local_kv: int, dcp_size: int, dcp_rank: int, device: torch.device
) -> slice | torch.Tensor:
    """Return `kv_heads_of_local_q` as an index into dim 1 of [tokens, `local_kv`, dim].

    A GQA kernel needs equally many query heads for each K/V head. If the local query
    heads allow that, the index is a slice, which takes a view. If they start inside a
    K/V head, it is a tensor on `device` with one K/V head for each query head. Callers
    share that tensor.
    """
    heads = kv_heads_of_local_q(own_q, local_kv, dcp_size, dcp_rank)
    first, last = heads[0], heads[-1]
    even = len({heads.count(head) for head in range(first, last + 1)}) == 1
    return slice(first, last + 1) if even else torch.tensor(heads, device=device)


@cache
def most_kept_kv_heads(own_q: int, local_kv: int, dcp_size: int) -> int:
    """Count the K/V heads that `kv_index_of_local_q` takes, at most of all ranks.

    A copy counts as a head.
    """
    counts = []
    for rank in range(dcp_size):
        kept = kv_index_of_local_q(own_q, local_kv, dcp_size, rank, torch.device("cpu"))
        counts.append(kept.stop - kept.start if isinstance(kept, slice) else len(kept))
    return max(counts)


@cache
def kv_windows(own_q: int, local_kv: int, dcp_size: int) -> tuple[int, tuple[int, ...]]:
    """Return how many K/V heads in a row each rank of a DCP group receives, and the first.

    A window holds all heads that serve the rank's local query heads. All windows have the
    same width, so that ranks exchange equal sizes. Arguments are those of
    `kv_heads_of_local_q`.
    """
    served = [
        kv_heads_of_local_q(own_q, local_kv, dcp_size, rank) for rank in range(dcp_size)
    ]
    width = max(heads[-1] - heads[0] + 1 for heads in served)
    return width, tuple(min(heads[0], local_kv - width) for heads in served)


@cache
def kv_heads_by_peer(
    own_q: int, local_kv: int, dcp_size: int, dcp_rank: int, device: torch.device
) -> torch.Tensor:
    """Return the heads of each rank's window: [ranks, width] int64, peers first.

    The last row is the window of `dcp_rank`. Callers share the tensor.
    """
    width, firsts = kv_windows(own_q, local_kv, dcp_size)
    order = [rank for rank in range(dcp_size) if rank != dcp_rank] + [dcp_rank]
    heads = [range(firsts[rank], firsts[rank] + width) for rank in order]
    return torch.tensor([list(window) for window in heads], device=device)


@cache
def kv_index_in_window(
    own_q: int, local_kv: int, dcp_size: int, dcp_rank: int, device: torch.device
) -> slice | torch.Tensor:
    """Return `kv_index_of_local_q` as an index into the heads of the rank's window."""
    kept = kv_index_of_local_q(own_q, local_kv, dcp_size, dcp_rank, device)
    first = kv_windows(own_q, local_kv, dcp_size)[1][dcp_rank]
    if isinstance(kept, slice):
        return slice(kept.start - first, kept.stop - first)
    return kept - first
