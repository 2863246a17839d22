"""The two process groups of decode context parallelism, created once per process.

Protocol, the same on every rank: ``initialize_model_parallel`` of SGLang, then
`init_dcp_groups`; at the end `destroy_dcp_groups`, then SGLang's own teardown. Making
and destroying a group is collective over the world, so the order must not differ.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Iterator, List

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_dcp.distributed.topology import Layout

__all__ = [
    "by_captured_communicator",
    "dcp_groups_for_capture",
    "destroy_dcp_groups",
    "get_attn_tp_group",
    "get_kvp_group",
    "graph_capture_with_dcp",
    "init_dcp_groups",
]

_KVP: GroupCoordinator | None = None
_ATTN_TP: GroupCoordinator | None = None


def init_dcp_groups(layout: Layout, *, backend: str | None = None) -> None:
    """Create the KVP and attention-TP groups over SGLang's world group.

    The world is read as consecutive pools of ``layout.tp_size`` global ranks (TP
    groups, for each pipeline stage or data-parallel replica). With ``dcp_size`` 1
    nothing is created and the accessors keep raising.

    Parameters
    ----------
    layout
        Sizes of one pool; the same on every rank.
    backend
        torch.distributed backend of the device groups; the world's if None.

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
    # Captured decode steps exchange over KVP. No step of attention communicates over
    # the head shards, and an NCCL communicator that nobody uses costs device memory.
    kvp = _new_group(layout.kvp_groups(pools), backend, "kvp", backend == "nccl")
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

    # Only gathers, scatters and all-to-alls run here. The three all-reduce back ends
    # would take IPC buffers (tens of MiB a rank) for a call that never comes, and the
    # message queue serves TP's request broadcast.
    return init_model_parallel_group(
        ranks,
        get_world_group().local_rank,
        backend,
        use_pynccl=use_pynccl,
        use_custom_allreduce=False,
        use_mscclpp_allreduce=False,
        use_torch_symm_mem_allreduce=False,
        use_message_queue_broadcaster=False,
        group_name=name,
    )


def destroy_dcp_groups() -> None:
    """Destroy the groups; harmless when there are none.

    Call before SGLang's ``destroy_distributed_environment``: a group cannot outlive
    the world it was cut from.
    """
    global _KVP, _ATTN_TP
    groups = [group for group in (_KVP, _ATTN_TP) if group is not None]
    _KVP = _ATTN_TP = None
    for group in groups:
        group.destroy()


def get_kvp_group() -> GroupCoordinator:
    """The ranks that share this rank's K/V heads, in ``kvp_rank`` order.

    Raises
    ------
    RuntimeError
        `init_dcp_groups` has not run, or ran with ``dcp_size`` 1.
    """
    return _require(_KVP, "KVP")


def get_attn_tp_group() -> GroupCoordinator:
    """The ranks with this rank's ``kvp_rank``, in ``attn_tp_rank`` order.

    Not SGLang's group of the same name, which belongs to DP attention. Collectives
    on it run over torch.distributed, also under graph capture.

    Raises
    ------
    RuntimeError
        `init_dcp_groups` has not run, or ran with ``dcp_size`` 1.
    """
    return _require(_ATTN_TP, "attention-TP")


def _require(group: GroupCoordinator | None, name: str) -> GroupCoordinator:
    if group is None:
        raise RuntimeError(
            f"The {name} group of decode context parallelism does not exist: "
            "init_dcp_groups() has not run with a --dcp-size above 1 in this process."
        )
    return group


@contextmanager
def by_captured_communicator(group: GroupCoordinator) -> Iterator[None]:
    """Within, eager collectives of `group` run by PyNccl, as captured ones do.

    For weights, at start and between steps; every rank of the group enters. Through
    torch.distributed, where SGLang sends what is not captured, NCCL would make another
    communicator at the first call, and a KV pool sized after that would be smaller.
    With NCCL_GRAPH_MIXING_SUPPORT=0 the communicator serves graphs or eager calls, never
    both at once, whatever the stream: so this waits for the device, before and after.
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
    """Groups whose back ends must be switched for capture; empty when DCP is off."""
    return [
        group
        for group in (_KVP, _ATTN_TP)
        if group is not None and group.world_size > 1
    ]


@contextmanager
def graph_capture_with_dcp(
    original: Callable[..., ContextManager[Any]], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """SGLang's ``graph_capture`` with the DCP groups taking part.

    Body of an AROUND hook on ``parallel_state.graph_capture``. Each group enters its
    own capture on the stream that ``original`` chose, which enables PyNccl on
    KVP there: outside capture SGLang keeps it off.

    Parameters
    ----------
    original
        The unhooked ``graph_capture``; called with the remaining arguments.

    Yields
    ------
    The context object of ``original``.
    """
    with original(*args, **kwargs) as context, ExitStack() as stack:
        for group in dcp_groups_for_capture():
            stack.enter_context(group.graph_capture(context))
        yield context
