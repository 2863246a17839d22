"""Exchange in one kernel: stores to the peers' memory over NVLink, waits, combines."""

from __future__ import annotations

import logging
from typing import Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.exchange import symm_a2a_kernel as kernels
from sglang_dcp.distributed.exchange.a2a import A2AExchange
from sglang_dcp.distributed.exchange.base import ExchangeGroup, WorkspaceSpec
from sglang_dcp.layers.merge import Merged
from sglang_dcp.layers.merge_peers import empty_state

logger = logging.getLogger(__name__)

# What one rank sends one peer in a call: 2 x KVP of it, and a sixteenth more for LSEs, is
# the memory of an inbox at most; partial outputs of 8 MiB, which decode seldom exceeds,
# fit at KVP 2.
MAX_PAYLOAD_BYTES = 8 << 20
# Where a word that is all ones, and the one sent in its place, are NaNs and nothing else.
GATHERED_DTYPES = (*kernels.ELEMENTS, torch.float8_e4m3fn, torch.float8_e5m2)


class SymmA2AExchange(A2AExchange):
    """``symm_a2a.cu`` where it fits, NCCL's all-to-all where it does not.

    What fits is decided from shapes, which are equal on all ranks: up to the workspace's
    capacity, rows of whole 16-byte vectors. Calls of a rank must follow each other on
    one stream (or on streams that wait for each other), eager and replayed alike.

    Parameters
    ----------
    group : KVP group of at most 8 ranks of one node; making the exchange is collective
    spec : the largest decode exchange
    """

    def __init__(
        self, group: ExchangeGroup, spec: Optional[WorkspaceSpec] = None
    ) -> None:
        super().__init__(group, spec)
        self._workspace: Optional[kernels.Workspace] = None
        self._said = False
        if group.world_size > 1:
            self._workspace = _workspace(group, spec or WorkspaceSpec())

    def gather_heads(self, q: Tensor) -> Tensor:
        """All-gather own heads [tokens, h, D] to all heads [tokens, h * N, D]."""
        workspace = self._workspace_for(q.shape[0] * q.shape[1], q)
        if workspace is None or q.dtype not in GATHERED_DTYPES:
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
        return_lse: bool,
    ) -> Merged:
        shape = self._own_shape(partial_out)
        workspace = self._workspace_for(shape[0] * shape[1], partial_out)
        if workspace is None:
            return super()._reduce(
                partial_out, lse, empty_rows, is_lse_base_on_e, return_lse
            )
        out, merged_lse = empty_state(torch.Size(shape), partial_out)
        kernels.reduce_heads(
            workspace,
            _addressable(partial_out),
            lse,
            None if empty_rows is None else empty_rows.contiguous(),
            out,
            merged_lse if return_lse else None,
            is_lse_base_on_e,
        )
        return (out, merged_lse) if return_lse else out

    def _workspace_for(self, rows: int, like: Tensor) -> Optional[kernels.Workspace]:
        """The workspace if ``rows`` rows as those of ``like`` fit it; zero rows do not."""
        row_bytes = like.shape[-1] * like.itemsize
        workspace = self._workspace
        if workspace is None or not rows:
            return None
        fits = kernels.fits_row(row_bytes)
        if fits and kernels.chunks_of(rows, row_bytes) <= workspace.chunks:
            return workspace
        if not self._said:
            self._said = True
            logger.info(
                "symm_a2a: %d rows of %d bytes do not fit the workspace; batches like this "
                "(prefill over a cached prefix) go by a2a",
                rows,
                row_bytes,
            )
        return None


def _workspace(
    group: ExchangeGroup, spec: WorkspaceSpec
) -> Optional[kernels.Workspace]:
    from sglang_dcp.distributed.symm_inbox import make_workspace, unreachable_peer

    if reason := unreachable_peer(group):
        logger.warning("symm_a2a: %s; a2a takes over for all batches", reason)
        return None
    return make_workspace(group, _capacity(spec), spec.timeout_s)


def _capacity(spec: WorkspaceSpec) -> int:
    most = MAX_PAYLOAD_BYTES // (kernels.THREADS * kernels.VECTOR_BYTES)
    # Longer rows go by a2a; the others of the same model still fit.
    row_bytes = min(spec.row_bytes, kernels.THREADS * kernels.VECTOR_BYTES)
    return min(kernels.chunks_of(spec.tokens * spec.heads, row_bytes), most)


def _addressable(rows: Tensor) -> Tensor:
    """``rows`` such that each starts at a multiple of 16 bytes and is contiguous."""
    vector = kernels.VECTOR_BYTES // rows.itemsize
    aligned = rows.data_ptr() % kernels.VECTOR_BYTES == 0
    whole = not any(stride % vector for stride in rows.stride()[:-1])
    if aligned and whole and rows.stride(-1) == 1:
        return rows
    # Not contiguous(), which returns a contiguous tensor wherever it starts.
    return rows.clone(memory_format=torch.contiguous_format)
