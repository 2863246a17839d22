"""Seams of a scheduler process: proof of the seams, context, groups."""

from __future__ import annotations

import logging
import os
from typing import Any, Callable

import torch

from sglang_dcp.config import dcp_of
from sglang_dcp.context import DcpContext, clear_context, find_context, set_context

logger = logging.getLogger(__name__)


def configure_scheduler_process(
    server_args: Any, gpu_id: int, tp_rank: int, *args: Any, **kwargs: Any
) -> None:
    """Seam: first statement of a scheduler process after the plugins were loaded.

    Raises
    ------
    SystemExit
        Where DCP is on and a seam is not live or SGLang's source is not the known one.
    """
    config = dcp_of(server_args)
    if config is None:
        return
    from sglang_dcp.verify import exit_unless_verified

    exit_unless_verified()
    _stop_nccl_graph_mixing(server_args)
    set_context(DcpContext(config, tp_rank))


def _stop_nccl_graph_mixing(server_args: Any) -> None:
    """Spare captured NCCL calls the events that order them against calls outside.

    NCCL reads the variable once, when it makes its first communicator. It asks that no
    communicator then runs an eager call, or a second graph in parallel, while a graph
    of it is outstanding. SGLang keeps one communicator for captured calls (PyNccl's)
    and one for eager calls (torch.distributed's), except for MoE groups that are not the
    whole tensor-parallel group, which have no PyNccl; our one eager call by PyNccl waits
    for the device (`by_captured_communicator`). A value of the user's stays.
    """
    if server_args.ep_size in (1, server_args.tp_size):
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def initialize_model_parallel(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Seam: after SGLang made its groups."""
    from sglang_dcp.distributed.groups import init_dcp_groups

    context = find_context()
    if context is not None:
        init_dcp_groups(context.config.layout)
    return result


def destroy_model_parallel(*args: Any, **kwargs: Any) -> None:
    """Seam: before SGLang destroys its groups."""
    from sglang_dcp.distributed.groups import destroy_dcp_groups

    destroy_dcp_groups()
    clear_context()


def group_all_to_all_single(
    original: Callable[..., None],
    group: Any,
    output: torch.Tensor,
    input: torch.Tensor,
) -> None:
    """Seam: `GroupCoordinator.all_to_all_single`, with PyNccl where it may be used."""
    if find_context() is None:
        original(group, output, input)
        return
    from sglang_dcp.distributed.all_to_all import group_all_to_all_single as exchange

    exchange(group, output, input)
