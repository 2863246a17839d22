"""Several query tokens of one request as rows of a decode step: what each of them sees.

A request has H committed tokens, and a forward brings `width` query tokens more, which
form a chain: token j follows token j - 1. Row j of the request is query token j. It sees
the positions 0 to H + j, which are H + j + 1 keys. On a rank these are
`layout.local_lens(H + j + 1, ...)` keys, all in the request's own table row. In a
verification all requests have one width. In a prefill each has its own.

The functions are pure. Rows lie request after request.
"""

from __future__ import annotations

import torch


def spread_rows(values: torch.Tensor, width: int) -> torch.Tensor:
    """Repeat a value of each request for each of its rows: [requests x width]."""
    return values.repeat_interleave(width)


def row_lens(committed: torch.Tensor, width: int) -> torch.Tensor:
    """Return how many positions each row sees.

    Parameters
    ----------
    committed : Tensor [requests] int
        Tokens of each request before the first query token.
    width : int
        Query tokens of each request.

    Returns
    -------
    Tensor [requests x width]
        In the dtype and on the device of `committed`. Nothing waits for the device.
    """
    order = torch.arange(1, width + 1, dtype=committed.dtype, device=committed.device)
    return (committed[:, None] + order).flatten()


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
    """Return how many positions each row sees, where each request has its own width.

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
