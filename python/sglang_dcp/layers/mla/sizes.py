"""The sizes of a runner's attention to latents, by which its prefills choose their form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_dcp.layers.backends.registry import split_below
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.releases.api import sglang_api

if TYPE_CHECKING:
    from sglang_dcp.config import DcpConfig


def mla_sizes(runner: Any, config: DcpConfig) -> MlaSizes:
    """Return the sizes of one rank of SGLang's `ModelRunner`."""
    model = runner.model_config
    args = sglang_api().resolved(runner.server_args)
    return MlaSizes(
        local_heads=model.num_attention_heads // config.tp_size,
        dcp_size=config.dcp_size,
        latent=model.kv_lora_rank,
        rope=model.qk_rope_head_dim,
        nope=model.qk_nope_head_dim,
        v=model.v_head_dim,
        stored_itemsize=runner.token_to_kv_pool.dtype.itemsize,
        split_below=split_below(args, mla=True),
    )
