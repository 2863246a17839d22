"""The split-LSE kernel against its reference; Triton's interpreter where there is no GPU.

Only here are requests without keys, fewer used splits than asked, and garbage in unused
splits put side by side.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from helpers import interpreter

SPLITS = (1, 8, 13)


def worst_difference(max_splits: int, device: str) -> float:
    """Largest |kernel - reference| over one ragged batch."""
    from sglang.kernels.ops.attention.decode_attention import _MIN_BLOCK_KV

    from sglang_dcp.ops.split_lse import reduce_split_lse
    from sglang_dcp.ops.split_lse_torch import reduce_split_lse_torch

    torch.manual_seed(0)
    keys = torch.tensor([0, 1, 31, 32, 33, 500, 4097, 0, 64])
    indptr = torch.nn.functional.pad(torch.cumsum(keys, 0), (1, 0)).to(torch.int32)
    asked = torch.randint(1, max_splits + 1, keys.shape, dtype=torch.int32)
    split_lse = torch.randn(len(keys), 5, max_splits) * 20
    want = reduce_split_lse_torch(split_lse, indptr, asked, _MIN_BLOCK_KV)
    for row, count in enumerate(keys.tolist()):
        each = -(-(-(-count // int(asked[row]))) // _MIN_BLOCK_KV) * _MIN_BLOCK_KV
        split_lse[row, :, -(-count // each) if count else 0 :] = float("nan")
    got = reduce_split_lse(*(t.to(device) for t in (split_lse, indptr, asked))).cpu()
    assert torch.equal(got.isneginf(), want.isneginf())
    finite = ~want.isneginf()
    return float((got[finite] - want[finite]).abs().max())


@pytest.fixture(scope="module")
def worst() -> dict[str, float]:
    return interpreter.results_of(__file__)


@pytest.mark.parametrize("max_splits", SPLITS)
def test_interpreted_kernel_equals_reference(
    max_splits: int, worst: dict[str, float]
) -> None:
    assert worst[str(max_splits)] < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPUs, found 0")
@pytest.mark.parametrize("max_splits", SPLITS)
def test_compiled_kernel_equals_reference(max_splits: int) -> None:
    assert worst_difference(max_splits, "cuda") < 1e-5


if __name__ == "__main__":
    if "--worker" in sys.argv:
        print(json.dumps({n: worst_difference(n, "cpu") for n in SPLITS}))
        sys.exit(0)
    sys.exit(pytest.main([__file__]))
