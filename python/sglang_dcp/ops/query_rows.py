"""Several query tokens of one request: which keys they see, and where they lie.

A request has H committed tokens, and a forward brings `width` query tokens more, which
form a chain: token j follows token j - 1. It sees the positions 0 to H + j. In a
verification all requests have one width. In a prefill each has its own.

The functions are pure. Query tokens lie request after request.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch


class Folding(NamedTuple):
    """Query tokens of a verification as more heads of one query.

    All query tokens of a request see its H committed tokens, without a mask. So they are
    like more query heads of each K/V head: a decode kernel serves them as one row, and
    reads the keys once for all of them.

    Attributes
    ----------
    width : query tokens of a request
    kv_heads : K/V heads
    group : query heads that a K/V head serves
    padded : heads that a K/V head serves once folded, `width * group` or more
    """

    width: int
    kv_heads: int
    group: int
    padded: int

    @property
    def heads(self) -> int:
        """Heads of a folded row."""
        return self.kv_heads * self.padded

    def fold(self, rows: torch.Tensor) -> torch.Tensor:
        """[requests x width, heads, dim] to [requests, folded heads, dim].

        Heads of a K/V head stay together, token after token. It is a view of contiguous
        rows if there is one K/V head.
        """
        if self.width == 1:
            return rows
        found = rows.unflatten(1, (self.kv_heads, self.group))
        found = found.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)
        missing = self.padded - found.shape[2]
        if missing:
            found = torch.nn.functional.pad(found, (0, 0, 0, missing))
        return found.flatten(1, 2)

    def unfold(self, rows: torch.Tensor) -> torch.Tensor:
        """[requests, folded heads, ...] to [requests x width, heads, ...]."""
        if self.width == 1:
            return rows
        used = self.width * self.group
        found = rows.unflatten(1, (self.kv_heads, self.padded))[:, :, :used]
        found = found.unflatten(2, (self.width, self.group)).transpose(1, 2)
        return found.flatten(2, 3).flatten(0, 1)


def folding_of(
    width: int, heads: int, kv_heads: int, tile: Optional[int] = None
) -> Folding:
    """Return how `width` query tokens with `heads` heads each become heads of one row.

    A kernel may take the heads of a K/V head `tile` at a time, and start each tile of
    theirs in the same K/V head only if whole tiles belong to one.
    """
    group = heads // kv_heads
    padded = width * group
    # Heads of one query are as SGLang gives them to the kernel.
    if tile is not None and min(kv_heads, width) > 1 and padded > tile:
        padded = -(-padded // tile) * tile
    return Folding(width, kv_heads, group, padded)


def request_of_rows(widths: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the request of each row: [rows] int64, on the device of `widths`.

    `widths` [requests] are the query tokens of each request, and `rows` is their sum, known
    on the host. So nothing waits for the device.
    """
    requests = torch.arange(len(widths), device=widths.device)
    return requests.repeat_interleave(widths, output_size=rows)


def ragged_row_lens(
    committed: torch.Tensor, widths: torch.Tensor, request: torch.Tensor
) -> torch.Tensor:
    """Return how many positions each query token sees as a row of its own.

    `committed` and `widths` are [requests], and `request` is what `request_of_rows` says.
    The result is [rows], in the dtype and on the device of `committed`.
    """
    first = widths.cumsum(0) - widths
    order = torch.arange(1, len(request) + 1, device=request.device)
    lens = committed[request] + order - first[request]
    return lens.to(committed.dtype)


def draft_step_lens(committed: torch.Tensor, step: int) -> torch.Tensor:
    """Return how many positions draft step `step` of each request sees.

    Step i writes position H + i and sees the positions 0 to H + i. What lies behind them
    are keys of tokens that an earlier verification may have rejected.
    """
    return committed + (step + 1)


def draft_step_slots(slots: torch.Tensor, requests: int, step: int) -> torch.Tensor:
    """Return the slots that draft step `step` writes: [requests], contiguous.

    `slots` is [requests x steps], the steps of a request next to each other.
    """
    return slots.view(requests, -1)[:, step].contiguous()


def chain_mask(requests: int, width: int) -> torch.Tensor:
    """Return the tree mask of chains: [requests, width, width] bool.

    Entry (i, j) says that token i sees token j.
    """
    return torch.ones(width, width, dtype=torch.bool).tril().repeat(requests, 1, 1)
