"""The exchange that sends partial outputs and their LSE in the same rows."""

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
from sglang_dcp.ops.partials import pack_partials, unpack_combine


class A2AExchange(Exchange):
    """Packs, runs one all-to-all between peers in the payload's dtype, and combines."""

    name = "a2a"
    summary = "one packed all-to-all of outputs and LSE"

    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
    ) -> tuple[Tensor, Tensor]:
        group, own = self.group, self._local_heads(partial_out)
        lse = mask_empty_rows(lse, empty_rows)
        sent = pack_partials(partial_out, lse, group.world_size, group.rank_in_group)
        received = torch.empty_like(sent)
        exchange_with_peers(group, received, sent)
        # The merged output may use this memory.
        del sent
        return unpack_combine(
            received,
            partial_out[:, own],
            lse[:, own],
            group.rank_in_group,
            is_lse_base_on_e=is_lse_base_on_e,
        )


def dcp_a2a_lse_reduce(
    partial_out: Tensor,
    lse: Tensor,
    group: ExchangeGroup,
    *,
    is_lse_base_on_e: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merge the partial outputs of all ranks with ``A2AExchange``.

    Public API, under SGLang's name. It is for attention code that calls SGLang's function
    of this name. ``Exchange.reduce`` describes shapes, dtypes and errors. Safe in
    CUDA-graph capture.

    Returns
    -------
    out : [tokens, h, D] of local heads in ``partial_out.dtype``
    lse : [tokens, h] fp32, merged, only with ``return_lse``
    """
    merged = A2AExchange(group).reduce(
        partial_out, lse, is_lse_base_on_e=is_lse_base_on_e
    )
    return merged if return_lse else merged[0]
