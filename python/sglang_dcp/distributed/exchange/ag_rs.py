"""Exchange by all-gather of the LSE and reduce-scatter of corrected outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_dcp.distributed.exchange.base import Exchange, ExchangeGroup
from sglang_dcp.layers.merge import Merged, correct_attn_out


class AllGatherReduceScatterExchange(Exchange):
    """Gather LSE, scale the own partial output, reduce-scatter it by head in fp32."""

    def _reduce(
        self, partial_out: Tensor, lse: Tensor, is_lse_base_on_e: bool, return_lse: bool
    ) -> Merged:
        group = self.group
        tokens, own_heads, head_dim = self._own_shape(partial_out)
        lses = group.all_gather(lse.contiguous(), dim=0)
        # Heads first: the reduce-scatter then hands out whole heads, with no slicing.
        by_head = partial_out.new_empty(
            own_heads * group.world_size, tokens, head_dim, dtype=torch.float32
        )
        _, merged_lse = correct_attn_out(
            partial_out,
            lses.view(group.world_size, *lse.shape),
            group.rank_in_group,
            is_lse_base_on_e=is_lse_base_on_e,
            corrected=by_head.transpose(0, 1),
        )
        reduced = by_head.new_empty(own_heads, tokens, head_dim)
        _reduce_scatter(group, reduced, by_head)
        out = partial_out.new_empty(tokens, own_heads, head_dim)
        out.copy_(reduced.transpose(0, 1))
        if not return_lse:
            return out
        first = group.rank_in_group * own_heads
        return out, merged_lse[:, first : first + own_heads].contiguous()


def _reduce_scatter(group: ExchangeGroup, output: Tensor, input_: Tensor) -> None:
    if input_.is_cpu:
        # SGLang registers its reduce-scatter op for the accelerator only.
        torch.distributed.reduce_scatter_tensor(
            output, input_, group=group.device_group
        )
    else:
        group.reduce_scatter_tensor(output, input_)
