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
_PLANNED = ("symm_a2a",)


def create_exchange(name: str, group: ExchangeGroup) -> Exchange:
    """Exchange ``name`` over ``group``; ValueError for a name that is not registered."""
    if name in EXCHANGES:
        return EXCHANGES[name](group)
    reason = "not available in this version" if name in _PLANNED else "unknown"
    raise ValueError(
        f"--dcp-comm-backend {name}: {reason}; choose one of {', '.join(EXCHANGES)}"
    )


__all__ = [
    "A2AExchange",
    "AllGatherReduceScatterExchange",
    "EXCHANGES",
    "Exchange",
    "ExchangeGroup",
    "create_exchange",
    "dcp_a2a_lse_reduce",
]
