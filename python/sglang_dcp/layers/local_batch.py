"""The batch as one rank's pool sees it: local lengths, local slots, local table.

On CUDA one kernel launch for each forward builds it (`local_batch_triton`). On CPU torch
operators build it (`local_batch_torch`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Callable, Optional

import torch

from sglang_dcp.layers.local_batch_torch import fill_local_tensors_torch
from sglang_dcp.layers.local_batch_types import LocalTensors, Shard
from sglang_dcp.ops.layout import local_lens

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class LocalBatch:
    """One forward as this rank's pool sees it.

    Attributes
    ----------
    forward_batch : ForwardBatch
        Copy of SGLang's batch, or in graph replay a namespace of the same fields.
        `seq_lens`, `seq_lens_cpu`, `seq_lens_sum` and `out_cache_loc` are those of this
        rank's pool. In extend the lengths are those of the cached prefix.
    has_cached_kv : bool
        Whether any rank reads cached keys for this batch. The same on all ranks.
    empty_rows : Tensor [tokens] bool
        True for queries whose request has no key on this rank. Tokens with which SGLang
        pads a prefill belong to no request, and are not among them.
    width : int
        Query tokens of each request in a decode step. Above 1 they are a chain, which a
        verification brings.
    """

    forward_batch: ForwardBatch
    has_cached_kv: bool
    empty_rows: torch.Tensor
    width: int = 1

    @cached_property
    def rows_to_mask(self) -> Optional[torch.Tensor]:
        """`empty_rows`, or None if every request has a key on this rank.

        Not for captured steps: there, lengths change from replay to replay.
        """
        has_empty = not bool(self.forward_batch.seq_lens_cpu.all())
        return self.empty_rows if has_empty else None


# Arguments: shard, SGLang's batch, lengths to read, the longest of them, tensors to fill.
FillLocalTensors = Callable[
    [Shard, "ForwardBatch", torch.Tensor, int, LocalTensors], None
]


class LocalBatchBuilder:
    """Builds a `LocalBatch` from each batch and owns the local slot table.

    Parameters
    ----------
    table : Tensor [requests, positions]
        SGLang's `req_to_token`.
    dcp_size, dcp_rank : int
    page_size : int
        Tokens of a page in the rank's pool.

    Attributes
    ----------
    shard : Shard
    local_table : Tensor [requests, ceil(positions / dcp_size)]
        The local slot table. The rows of a batch are current once its local batch is
        built.
    """

    def __init__(
        self, table: torch.Tensor, dcp_size: int, dcp_rank: int, page_size: int
    ) -> None:
        rows, positions = table.shape
        self.local_table = table.new_zeros(rows, -(-positions // dcp_size))
        self.shard = Shard(table, self.local_table, dcp_size, dcp_rank, page_size)
        self._fill = _filler_for(table.device)
        self._static: Optional[LocalTensors] = None

    def sibling(self) -> LocalBatchBuilder:
        """Return a builder over the same local table, with static tensors of its own."""
        other = copy.copy(self)
        other._static = None
        return other

    def init_static(self, max_bs: int, width: int = 1) -> None:
        """Allocate the tensors that captured decode steps read at every replay.

        They hold `max_bs` requests with `width` query tokens each.
        """
        device, tokens = self.local_table.device, max_bs * width
        self._static = LocalTensors(
            seq_lens=torch.zeros(max_bs, dtype=torch.int64, device=device),
            out_cache_loc=torch.zeros(tokens, dtype=torch.int64, device=device),
            empty_rows=torch.zeros(tokens, dtype=torch.bool, device=device),
        )

    def build_static(self, batch: ForwardBatch, width: int = 1) -> LocalBatch:
        """Build the local batch of a captured decode step, in the static tensors.

        It runs outside the graph, before each replay. `init_static` must have run, with
        the same `width`.
        """
        assert self._static is not None, "init_static has not run"
        lens, *of_tokens = self._static
        requests = batch.batch_size
        tokens = (tensor[: requests * width] for tensor in of_tokens)
        out = LocalTensors(lens[:requests], *tokens)
        return self._build(batch, *_lens_to_read(batch), out, width)

    def build(self, batch: ForwardBatch, width: int = 1) -> LocalBatch:
        """Build the local batch of `batch` and refresh the table rows that it reads.

        In a decode step, each request has `width` query tokens.
        """
        extend = batch.forward_mode.is_extend()
        tokens = sum(batch.extend_seq_lens_cpu) if extend else batch.batch_size * width
        slots = batch.out_cache_loc
        if len(slots) < tokens or (len(slots) > tokens and not extend):
            raise ValueError(f"{len(slots)} slots for {tokens} new tokens")
        # SGLang pads a prefill for its own scatter over ranks.
        slots = slots[:tokens]
        lens, lens_cpu = _lens_to_read(batch)
        out = LocalTensors(
            seq_lens=torch.empty_like(lens),
            out_cache_loc=torch.empty_like(slots),
            empty_rows=torch.empty_like(slots, dtype=torch.bool),
        )
        return self._build(batch, lens, lens_cpu, out, width)

    def _build(
        self,
        batch: ForwardBatch,
        lens: torch.Tensor,
        lens_cpu: torch.Tensor,
        out: LocalTensors,
        width: int,
    ) -> LocalBatch:
        longest = int(lens_cpu.max())
        self._fill(self.shard, batch, lens, longest, out)
        local = self._local_batch(batch, lens_cpu, out)
        return LocalBatch(local, longest > 0, out.empty_rows, width)

    def _local_batch(
        self, batch: ForwardBatch, lens_cpu: torch.Tensor, out: LocalTensors
    ) -> ForwardBatch:
        local = copy.copy(batch)
        local.seq_lens = out.seq_lens
        local.seq_lens_cpu = local_lens(
            lens_cpu, self.shard.dcp_size, self.shard.dcp_rank
        )
        local.seq_lens_sum = int(local.seq_lens_cpu.sum())
        if batch.forward_mode.is_extend():
            local.extend_prefix_lens = local.seq_lens
            local.extend_prefix_lens_cpu = local.seq_lens_cpu.tolist()
        local.out_cache_loc = out.out_cache_loc
        # Since 0.5.19 SGLang plans reads and writes of an iteration, by logical slots.
        local.kv_loc_plan = None
        return local


def _lens_to_read(batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many positions of each request are read, on the device and on the host."""
    if batch.forward_mode.is_extend():
        return batch.extend_prefix_lens, torch.as_tensor(batch.extend_prefix_lens_cpu)
    return batch.seq_lens, batch.seq_lens_cpu


def _filler_for(device: torch.device) -> FillLocalTensors:
    if device.type == "cpu":
        return fill_local_tensors_torch
    if device.type != "cuda":
        raise NotImplementedError(f"no local batch on {device}: cuda or cpu")
    # Not at module level: CPU users may have no Triton.
    from sglang_dcp.layers.local_batch_triton import fill_local_tensors

    return fill_local_tensors
