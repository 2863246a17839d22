"""Copies of K and V rows of several layers: kernels = torch forms = one row at a time.

Triton's interpreter runs the kernels where there is no GPU. Only here do odd sizes, windows
that overlap, several pools of one launch and rows of different dims for K and V meet.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from sglang_dcp.ops.kv_rows import order_kv_rows, pack_kv_rows
from sglang_dcp.ops.kv_rows_torch import order_kv_rows_torch, pack_kv_rows_torch


class Sizes(NamedTuple):
    layers: int
    ranks: int
    rows: int
    kv_heads: int
    window: int
    qk: int
    v: int
    dtype: torch.dtype


CHANGING = ("rows", "positions", "layers")
OF_A_MODEL = {"WINDOW", "QK", "V", "K_WIDTH", "V_WIDTH", "K_BLOCK", "V_BLOCK", "ROWS"}
CASES = {
    "one-head": Sizes(3, 2, 7, 1, 1, 128, 128, torch.bfloat16),
    "windows": Sizes(2, 3, 33, 4, 2, 64, 64, torch.float16),
    "qk-unlike-v": Sizes(2, 2, 5, 2, 2, 24, 16, torch.bfloat16),
    "odd": Sizes(4, 4, 9, 3, 2, 5, 3, torch.float32),
    "bytes": Sizes(1, 2, 3, 2, 1, 6, 4, torch.float8_e4m3fn),
    "one-row": Sizes(5, 2, 1, 1, 1, 64, 64, torch.bfloat16),
}


class Rows(NamedTuple):
    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    heads: Tensor
    packed: Tensor
    order: Tensor


def make(sizes: Sizes, device: str = "cpu") -> Rows:
    draw = torch.Generator().manual_seed(0)

    def pools(dim: int) -> list[Tensor]:
        shape = (40, sizes.kv_heads, dim)
        return [
            torch.randn(shape, generator=draw).to(sizes.dtype).to(device)
            for _ in range(sizes.layers)
        ]

    firsts = [rank % (sizes.kv_heads - sizes.window + 1) for rank in range(sizes.ranks)]
    heads = [list(range(first, first + sizes.window)) for first in firsts]
    width = sizes.window * (sizes.qk + sizes.v)
    shape = (sizes.ranks, sizes.layers, sizes.rows, width)
    order = torch.randperm(sizes.ranks * sizes.rows, generator=draw)
    # The caller fills these rows.
    order[2::5] = -1
    return Rows(
        pools(sizes.qk),
        pools(sizes.v),
        torch.randint(40, (sizes.rows,), generator=draw).to(device),
        torch.tensor(heads, device=device),
        torch.full(shape, 7.0, device=device).to(sizes.dtype),
        # Not all rows: the longest rank's padding is left out.
        order[: max(1, len(order) - 3)].to(device),
    )


def as_bytes(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cpu().contiguous().view(torch.uint8) for tensor in tensors]


def differ(name: str, device: str) -> int:
    """Count the bytes in which the kernels differ from the torch forms."""
    sizes = CASES[name]
    want, got = make(sizes), make(sizes, device)
    pack_kv_rows_torch(*want[:5])
    dims = (sizes.window, sizes.qk, sizes.v)
    expected = want.packed, *order_kv_rows_torch(want.packed, want.order, *dims)
    if device == "cpu":
        # The dispatch takes the torch forms there.
        from sglang_dcp.ops import kv_rows_triton as kernels

        kernels.pack(*got[:5])
        shape = (sizes.layers, len(got.order), sizes.window)
        found = [got.packed.new_empty(*shape, dim) for dim in dims[1:]]
        kernels.order(got.packed, got.order, *found)
    else:
        pack_kv_rows(*got[:5])
        found = [*order_kv_rows(got.packed, got.order, *dims)]
    copied = want.order >= 0
    packed, *ordered = expected
    wanted = [packed, *(rows[:, copied] for rows in ordered)]
    found = [rows.cpu()[:, copied] for rows in found]
    pairs = zip(as_bytes(*wanted), as_bytes(got.packed, *found))
    return sum(int((a != b).sum()) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_torch_forms_row_by_row(name: str) -> None:
    sizes = CASES[name]
    rows = make(sizes)
    pack_kv_rows(*rows[:5])
    found = order_kv_rows(rows.packed, rows.order, sizes.window, sizes.qk, sizes.v)
    flat = [(rank, row) for rank in range(sizes.ranks) for row in range(sizes.rows)]
    for pools, ordered in zip((rows.keys, rows.values), found):
        assert ordered.is_contiguous()
        for layer, place in itertools.product(
            range(sizes.layers), range(len(rows.order))
        ):
            if rows.order[place] < 0:
                continue
            rank, row = flat[int(rows.order[place])]
            want = pools[layer][rows.slots[row]][rows.heads[rank]]
            assert torch.equal(*as_bytes(ordered[layer, place], want))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, int]:
    return interpreter.results_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels(name: str, interpreted: dict[str, int]) -> None:
    assert interpreted[name] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPUs, found 0")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels(name: str) -> None:
    assert differ(name, "cuda") == 0


def test_no_length_of_a_prefix_compiles_a_kernel_anew() -> None:
    """Rows, positions and the layers of one gather change while a server runs."""
    pytest.importorskip("triton", reason="needs triton")
    from sglang_dcp.ops import kv_rows_triton as kernels

    for kernel in (kernels._pack_kernel, kernels._order_kernel):
        changing = [p for p in kernel.params if p.name in CHANGING]
        assert len(changing) >= 2
        for parameter in changing:
            assert parameter.do_not_specialize and not parameter.is_constexpr
        # Sizes of the model and of its blocks.
        constant = {p.name for p in kernel.params if p.is_constexpr}
        assert constant <= OF_A_MODEL


def test_wrong_arguments() -> None:
    rows = make(CASES["windows"])
    with pytest.raises(ValueError, match="layers of K"):
        pack_kv_rows(rows.keys[:1], *rows[1:5])
    with pytest.raises(ValueError, match="packed must be"):
        pack_kv_rows(*rows[:4], rows.packed[:1])
    strided = [pool.transpose(0, 1).contiguous().transpose(0, 1) for pool in rows.keys]
    with pytest.raises(ValueError, match="contiguous"):
        pack_kv_rows(strided, *rows[1:5])
    with pytest.raises(ValueError, match="in torch.float32"):
        pack_kv_rows([pool.float() for pool in rows.keys], *rows[1:5])
    with pytest.raises(ValueError, match="packed must hold"):
        order_kv_rows(rows.packed, rows.order, 1, 64, 64)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        print(json.dumps({name: differ(name, "cpu") for name in CASES}))
        sys.exit(0)
    sys.exit(pytest.main([__file__]))
