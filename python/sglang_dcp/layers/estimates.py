"""What SGLang's estimates of FLOPs and bytes must know of a rank with DCP.

`--enable-mfu-metrics` multiplies numbers per token with counts of tokens. With DCP the
counts are logical, so each number must be a rank's share of one logical token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch


class PerToken(NamedTuple):
    """FLOPs and bytes of one token on one rank, in all layers."""

    flops: float
    read_bytes: float
    write_bytes: float


def kv_bytes_per_token(pool: Any, dcp_size: int) -> float:
    """Return the bytes that a logical token takes in a rank's pool, on average.

    One rank of the DCP group stores the token and the others do not.

    Parameters
    ----------
    pool
        SGLang's KV pool of one rank, of K/V heads or of latents.
    dcp_size : int
    """
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    if isinstance(pool, MLATokenToKVPool):
        values = pool.kv_cache_dim
    else:
        values = pool.head_num * (pool.head_dim + pool.v_head_dim)
    return float(pool.layer_num * values * pool.store_dtype.itemsize / dcp_size)


class Product(NamedTuple):
    """A matrix product of one token.

    Attributes
    ----------
    inputs, outputs : int
    weight_bytes : float
        Bytes of the matrix, with its scales.
    dtype : torch.dtype
        Dtype of the outputs.
    """

    inputs: int
    outputs: int
    weight_bytes: float
    dtype: torch.dtype


def replicated_per_token(own: Iterable[Product], dcp_size: int) -> PerToken:
    """Return what replicated weights add to a decode token.

    A rank reads the weights of its peers too, and writes what they compute.

    Parameters
    ----------
    own : iterable of Product
        The rank's own share of each replicated product.
    dcp_size : int
    """
    peers = dcp_size - 1
    flops = read_bytes = write_bytes = 0.0
    for product in own:
        flops += 2.0 * product.inputs * product.outputs * peers
        read_bytes += product.weight_bytes * peers
        write_bytes += product.outputs * product.dtype.itemsize * peers
    return PerToken(flops, read_bytes, write_bytes)
