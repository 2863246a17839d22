"""Exchange by all-gather of the LSE and reduce-scatter of the outputs."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.all_to_all_peers import exchange_with_peers, one_launch
from sglang_dcp.distributed.exchange.base import Exchange, mask_empty_rows
from sglang_dcp.layers.merge import Merged
from sglang_dcp.layers.merge_peers import cut_combine, cut_partials


class AllGatherReduceScatterExchange(Exchange):
    """Gather the LSE of all heads, reduce-scatter the outputs weighted by it.

    The reduce-scatter is direct: a rank gets its heads from each peer as the attention
    kernel wrote them, weights and sums them in fp32. NCCL's own would have to be fed in
    fp32, at twice the bytes, not to round each weighted output; it would have to wait
    for the gathered LSE; and it sums in the order of its ring.
    """

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
        sent = cut_partials(partial_out, group.world_size, group.rank_in_group)
        received, lse = torch.empty_like(sent), lse.contiguous()
        with one_launch(group):
            lses = group.all_gather(lse, dim=0)
            exchange_with_peers(group, received, sent)
        # Launched by now; the merged output may take its memory.
        del sent
        return cut_combine(
            received,
            lses.view(group.world_size, *lse.shape)[..., own],
            partial_out[:, own],
            group.rank_in_group,
            is_lse_base_on_e=is_lse_base_on_e,
            return_lse=return_lse,
        )
