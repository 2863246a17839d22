"""Exchanges of partial attention outputs, one per ``--dcp-comm-backend``.

Left out: the packed row layout, which is private to ``a2a``.
"""

from sglang_dcp.distributed.exchange.a2a import A2AExchange, dcp_a2a_lse_reduce
from sglang_dcp.distributed.exchange.ag_rs import AllGatherReduceScatterExchange
from sglang_dcp.distributed.exchange.base import Exchange, ExchangeGroup

EXCHANGES: dict[str, type[Exchange]] = {
    "ag_rs": AllGatherReduceScatterExchange,
    "a2a": A2AExchange,
}
# Refused by name, not as a typo.
_PLANNED = ("symm_a2a",)


def exchange_class(name: str) -> type[Exchange]:
    """Class of exchange ``name``; ValueError for a name that is not registered."""
    if name in EXCHANGES:
        return EXCHANGES[name]
    reason = "is not available in this version" if name in _PLANNED else "is unknown"
    raise ValueError(
        f"--dcp-comm-backend {name} {reason}; use one of {', '.join(EXCHANGES)}"
    )


def create_exchange(name: str, group: ExchangeGroup) -> Exchange:
    """Exchange ``name`` over ``group``; ValueError for a name that is not registered."""
    return exchange_class(name)(group)


__all__ = [
    "A2AExchange",
    "AllGatherReduceScatterExchange",
    "EXCHANGES",
    "Exchange",
    "ExchangeGroup",
    "create_exchange",
    "dcp_a2a_lse_reduce",
    "exchange_class",
]
