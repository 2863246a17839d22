"""Memory of the slot tables, for sizing the KV pool beside them.

SGLang allocates its request table outside of `--mem-fraction-static`, and so does this
package its local table. SGLang also makes more rows where the pool has more tokens, as
it has with DCP. Both grow with the context length: at a million positions a row of the
request table takes 4 MB.
"""

from __future__ import annotations

from typing import Callable

import torch

# SGLang's request table has a row for padding, and so many positions beyond the context.
_EXTRA_ROWS = 1
_EXTRA_POSITIONS = 4
_ITEM = torch.int32.itemsize


def added_table_bytes(
    requests: int,
    requests_without_dcp: int,
    context_len: int,
    dcp_size: int,
    local_tables: int = 1,
) -> int:
    """Return the bytes of tables on a GPU that a server without DCP does not have.

    Parameters
    ----------
    requests : int
        Requests that may run at once.
    requests_without_dcp : int
        The same for a KV pool that holds one rank's tokens.
    context_len : int
        Most positions of a request.
    dcp_size : int
    local_tables : int
        One for each model with a KV pool of its own.
    """
    positions = context_len + _EXTRA_POSITIONS
    local_table = (requests + _EXTRA_ROWS) * -(-positions // dcp_size) * local_tables
    more_rows = max(0, requests - requests_without_dcp) * positions
    return (local_table + more_rows) * _ITEM


def tokens_beside_tables(
    tokens: int,
    page_size: int,
    token_bytes: float,
    budget_bytes: int,
    tables: Callable[[int], int],
) -> int:
    """Return `tokens`, or as many whole pages as fit into a budget with their tables.

    Parameters
    ----------
    tokens, page_size : int
        Tokens that are wanted, and tokens of a page.
    token_bytes : float
        Bytes of a token in the pool.
    budget_bytes : int
        What pool and tables may take together.
    tables : callable
        Bytes of the tables of a pool of so many tokens. It never falls.

    Returns
    -------
    int
        0 if not even a page fits.
    """

    def fits(size: int) -> bool:
        return size * token_bytes + tables(size) <= budget_bytes

    if fits(tokens):
        return tokens
    most, above = 0, tokens // page_size + 1
    while above - most > 1:
        pages = (most + above) // 2
        if fits(pages * page_size):
            most = pages
        else:
            above = pages
    return most * page_size
