"""The two process groups of decode context parallelism, created once per process.

Every rank calls SGLang's ``initialize_model_parallel``, then `init_dcp_groups`. At the
end it calls `destroy_dcp_groups`, then SGLang's teardown. Making and destroying a group
is collective over the world, so all ranks need the same order.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Iterator, List

from sglang_dcp.releases.api import sglang_api

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_dcp.distributed.topology import Layout

__all__ = [
    "use_pynccl",
    "dcp_groups_for_capture",
    "destroy_dcp_groups",
    "get_attn_tp_group",
    "get_dcp_group",
    "graph_capture_with_dcp",
    "init_dcp_groups",
]

_KVP: GroupCoordinator | None = None
_ATTN_TP: GroupCoordinator | None = None


def init_dcp_groups(layout: Layout, *, backend: str | None = None) -> None:
    """Create the DCP and attention-TP groups from SGLang's world group.

    The world is read as consecutive pools of ``layout.tp_size`` global ranks. A pool is
    one TP group, that of a pipeline stage or of a data-parallel replica. With DP attention
    it is one replica in a TP group, the ranks of SGLang's own attention-TP group. No group
    crosses a pool. With ``dcp_size`` 1 nothing is created, and the accessors keep raising.

    Parameters
    ----------
    layout
        Sizes of one pool. The same on every rank.
    backend
        torch.distributed backend of the device groups. None takes the world's.

    Raises
    ------
    RuntimeError
        The groups exist already.
    ValueError
        The world is not a whole number of pools.
    """
    from sglang.srt.distributed.parallel_state import get_world_group
    from torch.distributed import get_backend

    global _KVP, _ATTN_TP
    if _KVP is not None or _ATTN_TP is not None:
        raise RuntimeError(
            "The DCP groups exist already; call destroy_dcp_groups() before "
            "init_dcp_groups() is called a second time."
        )
    world = get_world_group()
    pools = _pools(world.world_size, layout.tp_size)
    if layout.dcp_size == 1:
        return
    backend = backend or get_backend(world.device_group)
    # Captured decode steps exchange over the DCP group, so it needs PyNccl. Nothing
    # communicates over the attention-TP group, and an unused NCCL communicator would
    # cost device memory.
    kvp = _new_group(layout.dcp_groups(pools), backend, "kvp", backend == "nccl")
    attn_tp = _new_group(layout.attn_tp_groups(pools), backend, "dcp_attn_tp", False)
    _KVP, _ATTN_TP = kvp, attn_tp


def _pools(world_size: int, tp_size: int) -> List[range]:
    if world_size % tp_size:
        raise ValueError(
            f"{world_size} ranks do not split into pools of --tp-size {tp_size}; "
            f"start a multiple of {tp_size} ranks."
        )
    return [range(first, first + tp_size) for first in range(0, world_size, tp_size)]


def _new_group(
    ranks: List[List[int]], backend: str, name: str, use_pynccl: bool
) -> GroupCoordinator:
    from sglang.srt.distributed.parallel_state import (
        get_world_group,
        init_model_parallel_group,
    )

    # Only gathers and all-to-alls run here. The three all-reduce backends would take IPC
    # buffers, tens of MiB for each rank, and nothing would use them. The message queue
    # is for the request broadcast of TP.
    return init_model_parallel_group(
        ranks,
        get_world_group().local_rank,
        backend,
        use_pynccl=use_pynccl,
        use_custom_allreduce=False,
        use_torch_symm_mem_allreduce=False,
        use_message_queue_broadcaster=False,
        group_name=name,
        **sglang_api().group_options(),
    )


def destroy_dcp_groups() -> None:
    """Destroy the groups. Does nothing if there are none.

    Call it before SGLang's ``destroy_distributed_environment``: a group cannot outlive
    its world.
    """
    global _KVP, _ATTN_TP
    groups = [group for group in (_KVP, _ATTN_TP) if group is not None]
    _KVP = _ATTN_TP = None
    for group in groups:
        group.destroy()


def get_dcp_group() -> GroupCoordinator:
    """Return the group of ranks that share this rank's K/V heads, in ``dcp_rank`` order.

    Raises
    ------
    RuntimeError
        `init_dcp_groups` has not run, or ran with ``dcp_size`` 1.
    """
    return _require(_KVP, "DCP")


def get_attn_tp_group() -> GroupCoordinator:
    """Return the group of ranks with this rank's ``dcp_rank``, in ``attn_tp_rank`` order.

    This is not SGLang's group of the same name, which belongs to DP attention. This
    package sends nothing over it, on one node or several. It is for forks and plugins
    that join what is sharded by K/V heads: scales of all K/V heads, or K/V of a whole
    token for a transfer. Its collectives run over torch.distributed, also in graph
    capture.

    Raises
    ------
    RuntimeError
        `init_dcp_groups` has not run, or ran with ``dcp_size`` 1.
    """
    return _require(_ATTN_TP, "attention-TP")


def _require(group: GroupCoordinator | None, name: str) -> GroupCoordinator:
    if group is None:
        raise RuntimeError(
            f"The {name} group of sglang-dcp does not exist: "
            "init_dcp_groups() has not run with a --dcp-size above 1 in this process."
        )
    return group


@contextmanager
def use_pynccl(group: GroupCoordinator) -> Iterator[None]:
    """Make eager collectives of `group` run on PyNccl, as captured ones do.

    It is for weights, at start and between steps. Every rank of the group must enter.
    SGLang sends eager collectives through torch.distributed, where NCCL would make
    another communicator at the first call. A KV pool that is sized later would then be
    smaller.

    With NCCL_GRAPH_MIXING_SUPPORT=0 a communicator must not serve a graph and an eager
    call at once, on whatever stream. So this waits for the device before and after.
    """
    pynccl = group.pynccl_comm
    if pynccl is None:
        yield
        return
    import torch

    torch.cuda.synchronize()
    with pynccl.change_state(enable=True):
        yield
    torch.cuda.synchronize()


def dcp_groups_for_capture() -> List[GroupCoordinator]:
    """Return the groups that must enter graph capture; empty with DCP off."""
    return [
        group
        for group in (_KVP, _ATTN_TP)
        if group is not None and group.world_size > 1
    ]


@contextmanager
def graph_capture_with_dcp(
    original: Callable[..., ContextManager[Any]], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Hook: ``parallel_state.graph_capture``; the DCP groups enter capture mode too.

    Each group enters its capture on the stream that ``original`` chose. That enables
    PyNccl on the DCP group, which SGLang keeps off outside of capture.

    Parameters
    ----------
    original
        SGLang's ``graph_capture``. It is called with the other arguments.

    Yields
    ------
    The context object of ``original``.
    """
    with original(*args, **kwargs) as context, ExitStack() as stack:
        for group in dcp_groups_for_capture():
            stack.enter_context(group.graph_capture(context))
        yield context
