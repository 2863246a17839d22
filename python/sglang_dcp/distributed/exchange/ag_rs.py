"""The exchange that all-gathers the LSE and reduce-scatters the outputs."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers, nccl_group
from sglang_dcp.distributed.exchange.base import Exchange, mask_empty_rows
from sglang_dcp.ops.partials import combine_from_peers, slice_for_peers


class AllGatherReduceScatterExchange(Exchange):
    """Gathers the LSE of all heads and reduce-scatters the outputs, weighted by it.

    The reduce-scatter is direct: a rank receives its heads from each peer as the
    attention kernel wrote them, and weights and sums them in fp32. NCCL's reduce-scatter
    would need fp32, at twice the bytes, or it would round each weighted output. It would
    also have to wait for the gathered LSE, and it sums in the order of its ring.
    """

    name = "ag_rs"
    summary = "all-gather the LSE, reduce-scatter the outputs"

    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
    ) -> tuple[Tensor, Tensor]:
        group, own = self.group, self._local_heads(partial_out)
        lse = mask_empty_rows(lse, empty_rows)
        sent = slice_for_peers(partial_out, group.world_size, group.rank_in_group)
        received, lse = torch.empty_like(sent), lse.contiguous()
        with nccl_group(group):
            lses = group.all_gather(lse, dim=0)
            exchange_with_peers(group, received, sent)
        # The send is launched by now, so the merged output may use this memory.
        del sent
        return combine_from_peers(
            received,
            lses.view(group.world_size, *lse.shape)[..., own],
            partial_out[:, own],
            group.rank_in_group,
            is_lse_base_on_e=is_lse_base_on_e,
        )
