"""Exchange of partial outputs with their LSE in the same rows."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers
from sglang_dcp.distributed.exchange.base import (
    Exchange,
    ExchangeGroup,
    mask_empty_rows,
)
from sglang_dcp.layers.merge import Merged
from sglang_dcp.layers.merge_peers import pack_partials, unpack_combine


class A2AExchange(Exchange):
    """Pack, one all-to-all between peers in the payload's dtype, unpack and combine."""

    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
        return_lse: bool,
    ) -> Merged:
        group, own = self.group, self._own_heads(partial_out)
        lse = mask_empty_rows(lse, empty_rows)
        sent = pack_partials(partial_out, lse, group.world_size, group.rank_in_group)
        received = torch.empty_like(sent)
        exchange_with_peers(group, received, sent)
        # The merged output may take its memory.
        del sent
        return unpack_combine(
            received,
            partial_out[:, own],
            lse[:, own],
            group.rank_in_group,
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
