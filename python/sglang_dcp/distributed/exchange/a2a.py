"""Exchange by one all-to-all of outputs with their LSE packed into the same rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_dcp.distributed.exchange.base import Exchange, ExchangeGroup
from sglang_dcp.layers.merge import Merged, pack_partials, unpack_combine


class A2AExchange(Exchange):
    """Pack, one ``all_to_all_single`` in the payload's dtype, unpack and combine."""

    def _reduce(
        self, partial_out: Tensor, lse: Tensor, is_lse_base_on_e: bool, return_lse: bool
    ) -> Merged:
        send = pack_partials(partial_out, lse, self.group.world_size)
        received = torch.empty_like(send)
        self.group.all_to_all_single(received, send)
        return unpack_combine(
            received,
            partial_out.shape[-1],
            is_lse_base_on_e=is_lse_base_on_e,
            return_lse=return_lse,
        )


def dcp_a2a_lse_reduce(
    partial_out: Tensor,
    lse: Tensor,
    group: ExchangeGroup,
    *,
    is_lse_base_on_e: bool = True,
    return_lse: bool = False,
) -> Merged:
    """``A2AExchange.reduce`` as a function, under the name that SGLang uses."""
    return A2AExchange(group).reduce(
        partial_out, lse, is_lse_base_on_e=is_lse_base_on_e, return_lse=return_lse
    )
