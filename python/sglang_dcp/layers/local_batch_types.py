"""The types that the torch and the Triton form of a local batch share."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shard(NamedTuple):
    """A rank's share of SGLang's slot table."""

    table: torch.Tensor  # [requests, positions], logical slots
    local_table: torch.Tensor  # [requests, ceil(positions / dcp_size)]
    dcp_size: int
    dcp_rank: int
    page_size: int  # of the rank's pool


class LocalTensors(NamedTuple):
    """The tensors of a local batch, beside the local table. Captured decode reads them."""

    seq_lens: torch.Tensor  # [requests] int64; in extend the dtype of SGLang's lengths
    out_cache_loc: torch.Tensor  # [tokens] int64
    empty_rows: torch.Tensor  # [tokens] bool
