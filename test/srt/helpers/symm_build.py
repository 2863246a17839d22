"""Variants of `symm_a2a.cu` that checks need, compiled before them in threads.

One after the other, when they are first asked for, they take longer than the checks: a variant
for each rank, size, dtype and log base. NVRTC compiles in as many threads as there are cores:
its binding lets go of the interpreter, and it holds no lock of its own meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import patch

import torch

from helpers import symm_cases as cases
from helpers.symm_cases import DTYPES, Q_DTYPES, Case
from helpers.symm_layers import Size, case_of
from sglang_dcp.distributed.exchange.symm_a2a import kernel as kernels

Defines = dict[str, int]


def reduce_variant(case: Case, rank: int) -> Defines:
    """What `reduce_heads` of this case is compiled with."""
    dtype = DTYPES[case.dtype]
    element = {"ELEMENT": kernels.ELEMENTS[dtype], "BASE_E": int(case.base == "e")}
    return {**_common(case.world_size, rank, case.dim * dtype.itemsize), **element}


def gather_variant(case: Case, rank: int) -> Defines:
    """What `gather_heads` of this case is compiled with."""
    size = case.dim * Q_DTYPES[case.dtype].itemsize
    return _common(case.world_size, rank, size)


def _common(world_size: int, rank: int, row_bytes: int) -> Defines:
    return {
        "WORLD": world_size,
        "RANK": rank,
        "THREADS": kernels.THREADS,
        "VECTORS": row_bytes // kernels.VECTOR_BYTES,
    }


def layer_variants(
    world_size: int, ranks: Sequence[int], sizes: Iterable[Size]
) -> Iterator[Defines]:
    """Of layers of these sizes (`symm_layers`): each gathers, then reduces."""
    for case in (case_of(world_size, size) for size in sizes):
        for rank in ranks:
            yield reduce_variant(case, rank)
            yield gather_variant(case, rank)


def simulation_variants() -> Iterator[Defines]:
    """Of all kernels that `test_symm_a2a_gpu` launches."""
    for case, rank in cases.loopback_cases(cases.LOOPBACK):
        yield reduce_variant(case, rank)
        yield gather_variant(case, rank)
    for case in cases.reduce_cases().values():
        yield from (reduce_variant(case, rank) for rank in range(case.world_size))
    gathers = list(cases.gather_cases().values())
    for world_size in cases.EMPTY_WORDS:
        gathers += cases.empty_word_cases(world_size)
    for case in gathers:
        yield from (gather_variant(case, rank) for rank in range(case.world_size))
    for world_size in cases.WORLDS:
        yield from layer_variants(world_size, range(world_size), cases.SEQUENCE)


def device_arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@contextmanager
def compiled_up_front(
    variants: Iterable[Defines], arch: str, missed: list[Defines], share: int = 1
) -> Iterator[None]:
    """Meanwhile `compile_source` knows `variants`; others are compiled, and `missed`.

    `share` processes do so at once on this machine.
    """
    wanted = {frozenset(defines.items()): defines for defines in variants}
    compile_source = kernels.compile_source
    threads = max(1, len(os.sched_getaffinity(0)) // share)
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(lambda defines: compile_source(defines, arch), wanted.values())
        cubins = dict(zip(wanted, done))

    def known(defines: Defines, of_arch: str) -> bytes:
        key = frozenset(defines.items())
        if of_arch == arch and key in cubins:
            return cubins[key]
        missed.append(defines)
        return compile_source(defines, of_arch)

    with patch.object(kernels, "compile_source", known):
        yield
