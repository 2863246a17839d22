"""Some requests of a prefill, for attention that others do not need: pure index math.

Requests keep their order, and new tokens keep theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate, compress
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class SomeRequests(NamedTuple):
    """Some requests of a prefill, as a rank's pool sees them.

    Attributes
    ----------
    rows : Tensor [tokens of these requests] int64
        Their new tokens among those of the batch, on the device.
    local : ForwardBatch
        The local batch of these requests alone.
    empty_rows : Tensor [tokens of these requests] bool, optional
        True where the rank has no key for a token's request; None if it has some for all.
    """

    rows: torch.Tensor
    local: ForwardBatch
    empty_rows: Optional[torch.Tensor]


def some_requests(local: ForwardBatch, taken: Sequence[bool]) -> SomeRequests:
    """Take the requests that `taken` marks out of the local batch of a prefill.

    It does not wait for the GPU.
    """
    device = local.seq_lens.device
    rows = rows_of(local.extend_seq_lens_cpu, taken).to(device, non_blocking=True)
    which = torch.tensor(taken).nonzero().flatten()
    on_device = which.to(device, non_blocking=True)
    some = copy.copy(local)
    some.batch_size = len(which)
    some.req_pool_indices = local.req_pool_indices[on_device]
    some.seq_lens = some.extend_prefix_lens = local.seq_lens[on_device]
    some.seq_lens_cpu = local.seq_lens_cpu[which]
    some.extend_prefix_lens_cpu = some.seq_lens_cpu.tolist()
    some.seq_lens_sum = sum(some.extend_prefix_lens_cpu)
    some.extend_seq_lens = local.extend_seq_lens[on_device]
    some.extend_seq_lens_cpu = list(compress(local.extend_seq_lens_cpu, taken))
    some.out_cache_loc = local.out_cache_loc[rows]
    return SomeRequests(rows, some, _empty_rows(some))


def rows_of(lens: Sequence[int], taken: Sequence[bool]) -> torch.Tensor:
    """Return the rows of the requests that `taken` marks: [rows] int64, on the host.

    `lens` counts the rows of each request, which lie request after request.
    """
    spans = compress(zip(lens, accumulate(lens)), taken)
    parts = [torch.arange(end - length, end) for length, end in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _empty_rows(local: ForwardBatch) -> Optional[torch.Tensor]:
    if all(local.extend_prefix_lens_cpu):
        return None
    return (local.seq_lens == 0).repeat_interleave(
        local.extend_seq_lens, output_size=sum(local.extend_seq_lens_cpu)
    )
