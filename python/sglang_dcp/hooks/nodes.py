"""Several nodes in a scheduler process: what it says of itself, and who belongs together."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Optional

import sglang_dcp
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext
from sglang_dcp.distributed.nodes import Node, NodesDisagree, check_nodes_agree
from sglang_dcp.releases.installed import sglang_version

logger = logging.getLogger(__name__)


def node_of(resolved: Any, config: DcpConfig) -> Optional[Node]:
    """Return this launch among several, or None for a single one.

    `resolved` has the server arguments as SGLang resolved them.
    """
    if resolved.nnodes == 1:
        return None
    return Node(
        rank=resolved.node_rank,
        count=resolved.nnodes,
        ranks=resolved.tp_size // resolved.nnodes,
        address=resolved.dist_init_addr or "the address of the environment",
        wait_s=float(resolved.dist_timeout or resolved.watchdog_timeout),
        facts=tuple(_facts(resolved, config).items()),
    )


def _facts(resolved: Any, config: DcpConfig) -> dict[str, str]:
    """Return what must be equal on all nodes.

    The log base of an LSE belongs to the attention backend, so two backends in one DCP
    group would merge to wrong outputs. What decides the form of a prefill decides its
    collectives. Captured sizes decide which short prefills are decode steps.
    """
    from sglang.srt.environ import envs

    from sglang_dcp.layers.short_prefill import SWITCH

    facts = {
        "--tp-size": resolved.tp_size,
        "--dp-size": resolved.dp_size,
        "number of attention replicas": config.layout.replicas,
        "--attn-tp-size": config.attn_tp_size,
        "--dcp-size": config.dcp_size,
        "--dcp-comm-backend": config.comm_backend,
        "--dcp-replicate-q-proj": config.replicate_q_proj,
        "--page-size": config.page_size,
        "--attention-backend": resolved.attention_backend,
        "--dtype": resolved.dtype,
        "--kv-cache-dtype": resolved.kv_cache_dtype,
        "--disable-chunked-prefix-cache": resolved.disable_chunked_prefix_cache,
        "--flashinfer-mla-disable-ragged": resolved.flashinfer_mla_disable_ragged,
        "SGLANG_MAX_KV_CHUNK_CAPACITY": envs.SGLANG_MAX_KV_CHUNK_CAPACITY.get(),
        SWITCH: os.environ.get(SWITCH, "1"),
        "--max-running-requests": resolved.max_running_requests,
        # Of SGLang 0.5.23 on. The steps came with it.
        "sizes of CUDA graphs": getattr(resolved, "cuda_graph_config", None),
        "sglang": sglang_version(),
        "sglang-dcp": sglang_dcp.__version__,
    }
    return {name: str(value) for name, value in facts.items()}


def exit_unless_nodes_agree(context: DcpContext) -> None:
    """End this process if the nodes do not belong together. Log where DCP groups lie."""
    node = context.node
    if node is None:
        return
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    node.met.set()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        check_nodes_agree(_get_default_store(), node, rank, world_size)
    except NodesDisagree as error:
        sys.exit(f"sglang-dcp: error: {error}")
    if rank % node.ranks == 0:
        logger.info(
            "DCP: node %d of %d with %d ranks; %s",
            node.rank,
            node.count,
            node.ranks,
            where_groups_lie(context.config, node),
        )


def where_groups_lie(config: DcpConfig, node: Node) -> str:
    """Return whether the exchange of `config` crosses nodes, for the log."""
    if config.layout.groups_inside_nodes(node.ranks):
        return f"each DCP group of {config.dcp_size} ranks lies inside a node"
    return (
        f"DCP groups of {config.dcp_size} ranks lie across nodes, and so do exchanges"
    )
