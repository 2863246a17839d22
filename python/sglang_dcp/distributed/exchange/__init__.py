"""Exchanges of partial attention outputs, one for each ``--dcp-comm-backend``.

The packed row layout is not exported, because only ``a2a`` uses it.
"""

from typing import Optional

from sglang_dcp.distributed.exchange.a2a import A2AExchange, dcp_a2a_lse_reduce
from sglang_dcp.distributed.exchange.ag_rs import AllGatherReduceScatterExchange
from sglang_dcp.distributed.exchange.base import (
    Exchange,
    ExchangeGroup,
    WorkspaceSpec,
)
from sglang_dcp.distributed.exchange.symm_a2a import SymmA2AExchange

EXCHANGES: dict[str, type[Exchange]] = {
    found.name: found
    for found in (AllGatherReduceScatterExchange, A2AExchange, SymmA2AExchange)
}


def exchange_class(name: str) -> type[Exchange]:
    """Return the class of exchange ``name``.

    Raises ValueError for a name that is not registered.
    """
    if name in EXCHANGES:
        return EXCHANGES[name]
    raise ValueError(
        f"--dcp-comm-backend {name} is unknown; use one of {', '.join(EXCHANGES)}"
    )


def create_exchange(
    name: str, group: ExchangeGroup, spec: Optional[WorkspaceSpec] = None
) -> Exchange:
    """Create exchange ``name`` over ``group``.

    All ranks of the group call it together, outside of graph capture. Raises ValueError
    for a name that is not registered.
    """
    return exchange_class(name)(group, spec)


__all__ = [
    "A2AExchange",
    "AllGatherReduceScatterExchange",
    "EXCHANGES",
    "Exchange",
    "ExchangeGroup",
    "SymmA2AExchange",
    "WorkspaceSpec",
    "create_exchange",
    "dcp_a2a_lse_reduce",
    "exchange_class",
]
