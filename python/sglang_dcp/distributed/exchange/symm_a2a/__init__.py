"""The exchange in one kernel that stores to the peers' memory over NVLink."""

from __future__ import annotations

import logging
from typing import Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.exchange.a2a import A2AExchange
from sglang_dcp.distributed.exchange.base import ExchangeGroup, WorkspaceSpec
from sglang_dcp.distributed.exchange.fallbacks import Fallbacks
from sglang_dcp.distributed.exchange.symm_a2a import kernel as kernels
from sglang_dcp.ops.partials import empty_state

logger = logging.getLogger(__name__)

# Most bytes that one rank sends to one peer in a call. Decode seldom needs more. An inbox
# takes at most 2 x dcp_size times this, and a sixteenth more for the LSEs.
MAX_PAYLOAD_BYTES = 8 << 20
# In these dtypes a word of all ones, and the word sent in its place, hold only NaNs.
GATHERED_DTYPES = (*kernels.ELEMENTS, torch.float8_e4m3fn, torch.float8_e5m2)


class SymmA2AExchange(A2AExchange):
    """Runs ``symm_a2a.cu`` where a call fits it, and ``a2a`` where it does not.

    A call fits if its rows are whole 16-byte vectors and the workspace has room for
    them. This depends on shapes alone, which are equal on all ranks. Without a workspace
    no call fits. Whether there is one is decided once, and is the same on all ranks of
    the group. The calls of a rank, eager or replayed, must run one after the other: on
    one stream, or on streams that wait for each other.

    In `fallbacks`, `row_size`, `capacity` and `dtype` are counted for each call that went
    by ``a2a``. `unreachable` and `rendezvous` are counted once, for all calls.

    Parameters
    ----------
    group : DCP group of at most 8 ranks of one node; all of them make the exchange together
    spec : the largest decode step
    """

    name = "symm_a2a"
    summary = "one kernel that stores to the peers' memory over NVLink"
    max_ranks = kernels.MAX_WORLD_SIZE
    needs_gpu = "its kernel stores to the memory of other NVIDIA GPUs"
    fallback_reasons = ("unreachable", "rendezvous", "row_size", "capacity", "dtype")

    def __init__(
        self, group: ExchangeGroup, spec: Optional[WorkspaceSpec] = None
    ) -> None:
        super().__init__(group, spec)
        self._workspace: Optional[kernels.Workspace] = None
        self._logged = False
        if group.world_size > 1:
            self._workspace = _workspace(group, spec or WorkspaceSpec(), self.fallbacks)

    @property
    def in_use(self) -> str:
        """Return `symm_a2a`, or `a2a` if there is no workspace."""
        return self.name if self._workspace is not None else A2AExchange.name

    @property
    def standing_bytes(self) -> int:
        """Return the bytes of this rank's inbox and of its counters; 0 without them."""
        if self._workspace is None:
            return 0
        chunks = self._workspace.chunks
        inbox = kernels.inbox_bytes(self.group.world_size, chunks)
        return inbox + self._workspace.uses.nbytes

    def gather_heads(self, q: Tensor) -> Tensor:
        """All-gather local heads [tokens, h, D] to all heads [tokens, h * N, D].

        The heads are in rank order. Any dtype: those that are not in `GATHERED_DTYPES`
        go by NCCL.
        """
        workspace = self._workspace_for(q.shape[0] * q.shape[1], q)
        if workspace is not None and q.dtype not in GATHERED_DTYPES:
            self.fallbacks.add("dtype")
            workspace = None
        if workspace is None:
            return super().gather_heads(q)
        q = _addressable(q)
        out = q.new_empty(q.shape[0], q.shape[1] * self.group.world_size, q.shape[2])
        kernels.gather_heads(workspace, q, out)
        return out

    def _reduce(
        self,
        partial_out: Tensor,
        lse: Tensor,
        empty_rows: Optional[Tensor],
        is_lse_base_on_e: bool,
    ) -> tuple[Tensor, Tensor]:
        shape = self._local_shape(partial_out)
        workspace = self._workspace_for(shape[0] * shape[1], partial_out)
        if workspace is None:
            return super()._reduce(partial_out, lse, empty_rows, is_lse_base_on_e)
        out, merged_lse = empty_state(torch.Size(shape), partial_out)
        kernels.reduce_heads(
            workspace,
            _addressable(partial_out),
            lse,
            None if empty_rows is None else empty_rows.contiguous(),
            out,
            merged_lse,
            is_lse_base_on_e,
        )
        return out, merged_lse

    def _workspace_for(self, rows: int, like: Tensor) -> Optional[kernels.Workspace]:
        """Return the workspace if ``rows`` rows like those of ``like`` fit it, else None.

        Zero rows do not fit.
        """
        row_bytes = like.shape[-1] * like.itemsize
        workspace = self._workspace
        if workspace is None or not rows:
            return None
        if not kernels.fits_row(row_bytes):
            reason = "row_size"
        elif kernels.chunks_of(rows, row_bytes) > workspace.chunks:
            reason = "capacity"
        else:
            return workspace
        self.fallbacks.add(reason)
        if not self._logged:
            self._logged = True
            logger.info(
                "symm_a2a: %d rows of %d bytes do not fit the workspace; batches like this "
                "(prefill over a cached prefix) go by a2a",
                rows,
                row_bytes,
            )
        return None


def _workspace(
    group: ExchangeGroup, spec: WorkspaceSpec, fallbacks: Fallbacks
) -> Optional[kernels.Workspace]:
    """Make the workspace, or count and log why no rank of the group has one."""
    from sglang_dcp.distributed.exchange.symm_a2a.rendezvous import StepFailed
    from sglang_dcp.distributed.exchange.symm_a2a.workspace import (
        make_workspace,
        unreachable_peer,
    )

    reason, fault = "unreachable", unreachable_peer(group)
    if not fault:
        try:
            return make_workspace(group, _capacity(spec), spec.timeout_s)
        except StepFailed as error:
            reason, fault = "rendezvous", f"the inboxes could not be mapped ({error})"
    fallbacks.add(reason)
    if group.rank_in_group == 0:
        logger.warning("symm_a2a: %s; a2a takes over for all batches", fault)
    return None


def _capacity(spec: WorkspaceSpec) -> int:
    most = MAX_PAYLOAD_BYTES // (kernels.THREADS * kernels.VECTOR_BYTES)
    # Longer rows go by a2a. Other rows of the same model may still fit.
    row_bytes = min(spec.row_bytes, kernels.THREADS * kernels.VECTOR_BYTES)
    return min(kernels.chunks_of(spec.tokens * spec.heads, row_bytes), most)


def _addressable(rows: Tensor) -> Tensor:
    """Return ``rows``, or a copy, whose rows are contiguous and start at 16-byte addresses."""
    vector = kernels.VECTOR_BYTES // rows.itemsize
    aligned = rows.data_ptr() % kernels.VECTOR_BYTES == 0
    whole = not any(stride % vector for stride in rows.stride()[:-1])
    if aligned and whole and rows.stride(-1) == 1:
        return rows
    # Not contiguous(), which returns a contiguous tensor even if its start is unaligned.
    return rows.clone(memory_format=torch.contiguous_format)
