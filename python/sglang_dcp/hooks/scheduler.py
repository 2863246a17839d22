"""Hooks of a scheduler process: proof of the hooks, context, process groups."""

from __future__ import annotations

import logging
import os
from typing import Any, Callable

import torch

from sglang_dcp.config import DcpConfig, dcp_of
from sglang_dcp.context import DcpContext, clear_context, find_context, set_context
from sglang_dcp.distributed.nodes import watch_meeting
from sglang_dcp.hooks.nodes import exit_unless_nodes_agree, node_of
from sglang_dcp.hooks.server_args import mixes_captured_and_eager
from sglang_dcp.releases.api import sglang_api

logger = logging.getLogger(__name__)


def configure_scheduler_process(
    server_args: Any, gpu_id: int, *args: Any, **kwargs: Any
) -> None:
    """Hook: `configure_scheduler_process`, the first call after the plugins were loaded.

    Raises
    ------
    SystemExit
        With DCP on, if a hook is not live or SGLang's source is not known.
    """
    config = dcp_of(server_args)
    if config is None:
        return
    from sglang_dcp.hooks.verify import exit_unless_verified

    exit_unless_verified()
    api = sglang_api()
    api.hide_dcp_size(server_args)
    resolved = api.resolved(server_args)
    _stop_nccl_graph_mixing(resolved, config)
    # SGLang numbers the ranks of a replica of DP attention in a row.
    rank = api.scheduler_tp_rank(args, kwargs) % config.tp_size
    node = node_of(resolved, config)
    set_context(DcpContext(config, rank, node))
    if node is not None:
        watch_meeting(node)


def _stop_nccl_graph_mixing(server_args: Any, config: DcpConfig) -> None:
    """Save captured NCCL calls the events that order them against eager calls.

    NCCL reads the variable once, when it makes its first communicator. With 0 it forbids
    two things while a graph of a communicator is outstanding: an eager call on it, and a
    second graph in parallel. SGLang uses PyNccl's communicators for captured calls and
    those of torch.distributed for eager calls. Our one eager call on PyNccl waits for the
    device (`use_pynccl`).

    Where other groups mix both (`mixes_captured_and_eager`), the variable stays as it is.
    A value that the user set stays too.
    """
    if not mixes_captured_and_eager(server_args, config):
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def initialize_model_parallel(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: `initialize_model_parallel`, after SGLang made its groups.

    Raises
    ------
    SystemExit
        With DCP on several nodes, if they do not belong together.
    """
    from sglang_dcp.distributed.groups import init_dcp_groups

    context = find_context()
    if context is not None:
        exit_unless_nodes_agree(context)
        init_dcp_groups(context.config.layout)
    return result


def destroy_model_parallel(*args: Any, **kwargs: Any) -> None:
    """Hook: `destroy_model_parallel`, before SGLang destroys its groups."""
    from sglang_dcp.distributed.groups import destroy_dcp_groups

    destroy_dcp_groups()
    clear_context()


def group_all_to_all_single(
    original: Callable[..., None],
    group: Any,
    output: torch.Tensor,
    input: torch.Tensor,
) -> None:
    """Hook: `GroupCoordinator.all_to_all_single`; on PyNccl where that is enabled."""
    if find_context() is None:
        original(group, output, input)
        return
    from sglang_dcp.distributed.all_to_all import group_all_to_all_single as exchange

    exchange(group, output, input)
