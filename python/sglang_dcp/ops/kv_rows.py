"""Copies of K and V rows of several layers at once: out of a pool, and into order.

A prefill that gathers its prefix packs rows of its pool for each rank of a DCP group. The
ranks swap them. Then each rank puts what it has in the order of positions. One launch does
either for all of the given layers, because a launch for each layer costs the host more than
the copies cost the GPU.

Any dtype. Neither function waits for the GPU. They are not for CUDA-graph capture: the
addresses of the pools are read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sglang_dcp.ops import kv_rows_torch
from sglang_dcp.ops.lse_merge import uses_kernels


def pack_kv_rows(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    heads: Tensor,
    packed: Tensor,
) -> None:
    """Copy rows of each layer's pool, for each rank the K/V heads that it needs.

    Parameters
    ----------
    keys, values : L tensors [pool, kv heads, qk] and [pool, kv heads, v]
        Contiguous. All of one dtype.
    slots : [rows] int64
    heads : [N, window] int64
        Heads for each rank, each row consecutive.
    packed : [N, L, rows, window * (qk + v)]
        Contiguous, of the dtype of the pools. It is written. A row holds all heads of K,
        then all of V.

    Raises
    ------
    ValueError
        Shapes, dtypes or strides are not as described above.
    """
    _check_pools(keys, values, packed)
    shape = (len(heads), len(keys), len(slots), _row_size(keys[0], values[0], heads))
    if packed.shape != shape or not packed.is_contiguous():
        raise ValueError(f"packed must be {shape}, got {tuple(packed.shape)}")
    if uses_kernels(*keys, *values, slots, heads, packed):
        # Not at module level: CPU users may have no Triton.
        from sglang_dcp.ops import kv_rows_triton

        kv_rows_triton.pack(keys, values, slots, heads, packed)
    else:
        kv_rows_torch.pack_kv_rows_torch(keys, values, slots, heads, packed)


def order_kv_rows(
    packed: Tensor, order: Tensor, window: int, qk: int, v: int
) -> tuple[Tensor, Tensor]:
    """Put packed rows of all ranks in order, K apart from V.

    Parameters
    ----------
    packed : [N, L, rows, window * (qk + v)], contiguous
    order : [positions] int64
        Index into [N, rows], flat. At -1, the row of the result is left to the caller, and
        may hold anything.
    window, qk, v : int
        Heads of a row, and their dims.

    Returns
    -------
    keys : [L, positions, window, qk]
    values : [L, positions, window, v], both contiguous, in the dtype of `packed`

    Raises
    ------
    ValueError
        `packed` is not as described above.
    """
    if packed.shape[3] != window * (qk + v) or not packed.is_contiguous():
        raise ValueError(
            f"packed must hold rows of {window * (qk + v)}, got {tuple(packed.shape)}"
        )
    if not uses_kernels(packed, order):
        return kv_rows_torch.order_kv_rows_torch(packed, order, window, qk, v)
    from sglang_dcp.ops import kv_rows_triton

    layers, positions = packed.shape[1], len(order)
    keys = packed.new_empty(layers, positions, window, qk)
    values = packed.new_empty(layers, positions, window, v)
    kv_rows_triton.order(packed, order, keys, values)
    return keys, values


def _row_size(key: Tensor, value: Tensor, heads: Tensor) -> int:
    return heads.shape[1] * (key.shape[2] + value.shape[2])


def _check_pools(
    keys: Sequence[Tensor], values: Sequence[Tensor], packed: Tensor
) -> None:
    if len(keys) != len(values) or not keys:
        raise ValueError(f"{len(keys)} layers of K and {len(values)} of V")
    for pools in (keys, values):
        for pool in pools:
            fits = pool.shape == pools[0].shape and pool.dtype == packed.dtype
            if not fits or not pool.is_contiguous():
                raise ValueError(
                    f"pools must be contiguous {tuple(pools[0].shape)} in "
                    f"{packed.dtype}, got {tuple(pool.shape)} in {pool.dtype}"
                )
