"""What an exchange does around its communication: rows for peers, and the merge with them.

Nothing is communicated: the ranks are simulated, each with data of its own. The oracle of
a merge is `lse_weighted_combine_torch` over all ranks, bit for bit where both run in torch.
Kernels run in Triton's interpreter, in a worker (``--worker``).
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from helpers.merge_cases import (
    DTYPES,
    INF,
    NAN,
    ROUNDING,
    Case,
    assert_same,
    kernel_cases,
    kernel_inputs,
    work,
)
from helpers.peer_exchange import (
    both_exchanges,
    heads_of,
    peers_of,
    received_by,
    same_bits,
)
from sglang_dcp.ops import lse_merge, lse_merge_torch, partials, partials_torch

KERNELS = ("pack", "cut", "unpack_combine", "combine_from_peers", "interleave")
# More rows than a program takes, and not a multiple of them.
CASES = kernel_cases(KERNELS) | {
    f"{kernel}-many-rows": Case(kernel, 3, 19, 3, 64, "fp32", "strided", "e")
    for kernel in KERNELS
}
WORLDS = (2, 3, 5, 8)


@pytest.mark.parametrize("base_e", [True, False], ids=["base-e", "base-2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", WORLDS, ids=lambda n: f"N{n}")
def test_ranks_merge_their_heads(world_size: int, dtype: str, base_e: bool) -> None:
    case = Case("", world_size, 4, 2, 33, dtype, "strided", "e")
    outs, lses = kernel_inputs(f"{world_size}-{dtype}", case)
    base = {"is_lse_base_on_e": base_e}
    for rank in range(world_size):
        # Of these heads alone: torch's exp rounds by an element's place in memory.
        own, own_lse = (x[:, :, heads_of(rank, 2)].contiguous() for x in (outs, lses))
        out, lse = lse_merge_torch.lse_weighted_combine_torch(own, own_lse, **base)
        assert out.isfinite().all(), "the inputs hold NaN"
        for got, got_lse in both_exchanges(outs, lses, rank, **base):
            # Summed in rank order, wherever the own partial lies.
            assert torch.equal(got, out.to(outs.dtype)) and torch.equal(got_lse, lse)
            assert got.is_contiguous() and got.dtype == outs.dtype
    assert "sglang_dcp.ops.partials_triton" not in sys.modules


@pytest.mark.parametrize("mark", [-INF, NAN, INF], ids=str)
@pytest.mark.parametrize("poison", [NAN, INF], ids=["nan-out", "inf-out"])
def test_empty_shards_do_not_poison(mark: float, poison: float) -> None:
    outs, lses = torch.randn(3, 2, 6, 8), torch.randn(3, 2, 6)
    outs[1], lses[1] = poison, mark
    wanted = lse_merge.lse_weighted_combine(outs[::2], lses[::2], return_lse=True)
    for rank in range(3):
        heads = heads_of(rank, 2)
        for got, got_lse in both_exchanges(outs, lses, rank):
            assert_same(got, wanted[0][:, heads], 3e-6)
            assert_same(got_lse, wanted[1][:, heads], 3e-6)
    outs[:], lses[:] = poison, mark
    for got, got_lse in both_exchanges(outs, lses, 1):
        assert got.count_nonzero() == 0 and torch.isneginf(got_lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 33, 64, 96, 128, 512])
def test_rows_are_aligned_and_lossless(head_dim: int, dtype: str) -> None:
    out = torch.randn(2, 6, head_dim).to(DTYPES[dtype])
    out[0, 0, 0] = NAN
    # Random bits, a signalling NaN and a subnormal: arithmetic would change them.
    lse_bits = torch.randint(-(2**31), 2**31, (2, 6), dtype=torch.int32)
    lse_bits[0, 0], lse_bits[0, 1] = 0x7F800001, 1
    lse = lse_bits.view(torch.float32)
    for rank in range(3):
        packed = partials.pack_partials(out, lse, 3, rank)
        cut = partials.slice_for_peers(out, 3, rank)
        assert packed.is_contiguous() and packed.shape[:3] == (2, 2, 2)
        assert packed.shape[3] * packed.element_size() % 16 == 0
        assert cut.is_contiguous() and cut.dtype == out.dtype
        for slot, peer in enumerate(peers_of(rank, 3)):
            payload, packed_lse = partials_torch.split_packed(packed[slot], head_dim)
            assert same_bits(payload, out[:, heads_of(peer, 2)])
            assert same_bits(cut[slot], out[:, heads_of(peer, 2)])
            assert same_bits(packed_lse, lse[:, heads_of(peer, 2)])


def test_gathered_heads_are_interleaved() -> None:
    every = torch.randn(5, 6, 8)
    gathered = torch.stack(every.chunk(3, dim=1))
    got = partials.interleave_heads(gathered)
    assert torch.equal(got, every) and got.is_contiguous()
    one_token = gathered[:, :1].contiguous()
    got = partials.interleave_heads(one_token)
    assert torch.equal(got, every[:1])
    assert got.data_ptr() == one_token.data_ptr(), "one token needs no copy"


def test_wrong_arguments_are_refused() -> None:
    out, lse = torch.randn(4, 6, 8), torch.randn(4, 6)
    with pytest.raises(ValueError, match="6 heads"):
        partials.pack_partials(out, lse, 4, 0)
    with pytest.raises(ValueError, match="6 heads"):
        partials.slice_for_peers(out, 4, 0)
    with pytest.raises(ValueError, match="rank 3 is outside 0..2"):
        partials.pack_partials(out, lse, 3, 3)
    with pytest.raises(TypeError, match="float64"):
        partials.pack_partials(out.double(), lse, 3, 0)
    with pytest.raises(NotImplementedError, match="meta"):
        partials.pack_partials(out.to("meta"), lse.to("meta"), 3, 0)
    packed = partials.pack_partials(out, lse, 2, 0)
    own = (out[:, :3], lse[:, :3])
    for wrong in (packed[:, :3], packed.half(), packed.mT.contiguous().mT, out[None]):
        with pytest.raises(ValueError, match=r"contiguous \[N - 1, 4, 3, 12\]"):
            partials.unpack_combine(wrong, *own, 0)
    with pytest.raises(ValueError, match="rank 2 is outside 0..1"):
        partials.unpack_combine(packed, *own, 2)
    cut, lses = partials.slice_for_peers(out, 2, 0), torch.stack([lse, lse])[..., :3]
    for few in (lses[:1], lses[:, :2], lses[..., :2]):
        with pytest.raises(ValueError, match="of 2 ranks"):
            partials.combine_from_peers(cut, few, own[0], 0)
    with pytest.raises(ValueError, match="rank -1 is outside"):
        partials.combine_from_peers(cut, lses, own[0], -1)


@pytest.fixture(scope="module")
def kernel_results() -> dict[str, str]:
    return interpreter.results_of(__file__)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_reference(case: str, kernel_results: dict[str, str]) -> None:
    assert kernel_results[case] == ""


def run_kernel(name: str, case: Case) -> None:
    """One kernel on every rank."""
    outs, lses = kernel_inputs(name, case)
    for rank in range(case.shards):
        if case.kernel == "interleave":
            check_interleave(outs[rank].contiguous(), case)
        elif "combine" in case.kernel:
            check_combine(outs, lses, rank, case)
        else:
            check_rows(outs[rank], lses[rank], rank, case)


def check_interleave(every: Tensor, case: Case) -> None:
    from sglang_dcp.ops import partials_triton as kernels

    out = torch.full_like(every, NAN)
    kernels.interleave(torch.stack(every.chunk(case.shards, dim=1)), out)
    assert same_bits(out, every)


def check_rows(out: Tensor, lse: Tensor, rank: int, case: Case) -> None:
    from sglang_dcp.ops import partials_triton as kernels

    if case.kernel == "cut":
        wanted = partials_torch.slice_for_peers_torch(out, case.shards, rank)
        cut = torch.full_like(wanted, NAN)
        kernels.cut(out, None, rank, cut)
        assert same_bits(cut, wanted)
        return
    wanted = partials_torch.pack_partials_torch(out, lse, case.shards, rank)
    packed = torch.full_like(wanted, NAN)
    kernels.cut(out, lse, rank, packed)
    both = (
        partials_torch.split_packed(rows, case.head_dim) for rows in (packed, wanted)
    )
    assert all(same_bits(got, want) for got, want in zip(*both))


def check_combine(outs: Tensor, lses: Tensor, rank: int, case: Case) -> None:
    from sglang_dcp.ops import partials_triton as kernels

    base_e = case.base == "e"
    heads, world = heads_of(rank, case.local_heads), case.shards
    if case.kernel == "unpack_combine":
        sent = [
            partials_torch.pack_partials_torch(*state, world, p)
            for p, state in enumerate(zip(outs, lses))
        ]
        rows = received_by(rank, sent)
        _, others = partials_torch.split_packed(rows, case.head_dim)
    else:
        sent = [
            partials_torch.slice_for_peers_torch(out, world, p)
            for p, out in enumerate(outs)
        ]
        rows, others = received_by(rank, sent), lses[:, :, heads]
    own = (outs[rank, :, heads], lses[rank, :, heads])
    out = torch.full(own[0].shape, NAN, dtype=outs.dtype)
    lse = torch.full(own[1].shape, NAN)
    kernels.combine(rows, others, *own, rank, out, lse, is_lse_base_on_e=base_e)
    # Not the reference beside the kernel: a wrong slot might be wrong in both.
    wanted, wanted_lse = lse_merge_torch.lse_weighted_combine_torch(
        outs[:, :, heads], lses[:, :, heads], is_lse_base_on_e=base_e
    )
    assert_same(out, wanted.to(out.dtype), ROUNDING[case.dtype])
    assert_same(lse, wanted_lse, 1e-5)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(CASES, run_kernel)
    else:
        sys.exit(pytest.main([__file__]))
