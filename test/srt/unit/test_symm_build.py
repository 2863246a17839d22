"""Kernels of the GPU checks of `symm_a2a` are compiled before the checks, in threads; on CPU.

Only this file sees that the list of variants is the one that the checks launch, no less and
no more, before a GPU machine compiles them one by one for minutes.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers import symm_build
from helpers import symm_checks as one_gpu
from helpers import symm_layers
from helpers import symm_ranks as ranks_gpu
from helpers import symm_sim
from helpers.gloo_ranks import fault_of
from helpers.on_cpu import OnCpu
from helpers.symm_build import Defines, compiled_up_front
from sglang_dcp.distributed.exchange.symm_a2a import kernel as kernels

CHUNKS = 4096
Keys = set[frozenset[tuple[str, int]]]


class FakeRanks:
    """Simulated ranks whose kernels only say which variant they are."""

    def __init__(self, world_size: int, chunks: int) -> None:
        self.world_size = world_size
        self.exchanges = [exchange(world_size, rank) for rank in range(world_size)]

    def all(self, call: Callable[[int], Any]) -> list[Any]:
        return [call(rank) for rank in range(self.world_size)]

    def capture(self, call: Callable[[int], Any]) -> tuple[Callable[[], None], Any]:
        return lambda: None, self.all(call)


def exchange(world_size: int, rank: int) -> Any:
    addresses = [0] * world_size
    return symm_sim.exchange_over(symm_sim.one_workspace(addresses, rank, CHUNKS, None))


@contextmanager
def recorded(launched: list[Defines]) -> Iterator[None]:
    """Kernels are not launched, what they are compiled with is noted."""
    unbuilt = SimpleNamespace(multi_processor_count=1, major=9, minor=0)

    class Noted(Exception):
        pass

    def note(defines: Defines, arch: str) -> bytes:
        launched.append(defines)
        raise Noted

    def built(*key: Any) -> Any:
        with pytest.raises(Noted):
            original(*key)
        return SimpleNamespace(launch=lambda *_: None)

    original = kernels._built.__wrapped__
    generator = torch.Generator
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(OnCpu())
        enter(patch.object(torch, "Generator", lambda *_: generator()))
        enter(patch("torch.cuda.current_device", lambda: 0))
        enter(patch("torch.cuda.get_device_properties", lambda *_: unbuilt))
        enter(patch.object(kernels, "compile_source", note))
        enter(patch.object(kernels, "_built", built))
        yield


def keys(variants: Any) -> Keys:
    return {frozenset(defines.items()) for defines in variants}


def test_one_gpu_launches_what_is_compiled_before() -> None:
    launched: list[Defines] = []
    with recorded(launched), ExitStack() as stack:
        enter = stack.enter_context
        simulated = {n: FakeRanks(n, CHUNKS) for n in (2, 3, 4, 5, 8)}
        enter(patch.object(one_gpu, "simulated", simulated.__getitem__))
        enter(patch.object(one_gpu, "loopback", fake_loopback))
        enter(patch.object(one_gpu, "STEPS", 1))
        for _, check in one_gpu.checks([]):
            # Nothing was computed, so it fails, after its launches.
            fault_of(check)
    assert keys(launched) == keys(symm_build.simulation_variants())


def fake_loopback(world_size: int, rank: int, chunks: int) -> Any:
    return symm_sim.one_workspace([0] * world_size, rank, CHUNKS, None)


@pytest.mark.parametrize("world_size, rank", [(2, 0), (2, 1), (8, 5)])
def test_a_rank_launches_what_is_compiled_before(world_size: int, rank: int) -> None:
    group = SimpleNamespace(world_size=world_size, rank_in_group=rank)
    launched: list[Defines] = []

    def one(*_: Any) -> Any:
        return exchange(world_size, rank)

    with recorded(launched), ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(ranks_gpu, "create_exchange", one))
        enter(patch.object(ranks_gpu, "exchange_of", one))
        enter(patch.object(symm_layers, "capture", lambda call: (None, call())))
        for name, check in ranks_gpu.checks(world_size, group, []):
            if name == "replays":
                check = partial(run_layers, group, one())
            fault_of(check)
    assert keys(launched) == keys(ranks_gpu.variants(world_size, rank))


def run_layers(group: Any, exchange: Any) -> None:
    for size in (*ranks_gpu.CAPTURED, *ranks_gpu.EAGER):
        symm_layers.Batch(group, exchange, size).call()


def test_compiled_up_front_in_threads() -> None:
    variants = list(itertools.islice(symm_build.simulation_variants(), 6))
    other = {**variants[0], "WORLD": 7}
    used = set()

    def compile_source(defines: Defines, arch: str) -> bytes:
        used.add(threading.get_ident())
        barrier.wait(10)
        return f"{sorted(defines.items())} {arch}".encode()

    barrier = threading.Barrier(2)
    missed: list[Defines] = []
    with patch.object(kernels, "compile_source", compile_source), patch(
        "os.sched_getaffinity", lambda _: range(4)
    ):
        # Two at a time, or the barrier breaks.
        with compiled_up_front(variants, "sm_90", missed, share=2):
            assert len(used) == 2
            for defines in variants:
                got = kernels.compile_source(defines, "sm_90")
                assert got == f"{sorted(defines.items())} sm_90".encode()
            assert len(used) == 2 and missed == []
            barrier = threading.Barrier(1)
            assert b"7" in kernels.compile_source(other, "sm_90")
            kernels.compile_source(variants[0], "sm_80")
            assert missed == [other, variants[0]]
        assert kernels.compile_source is compile_source


def test_threads_compile_at_the_same_time() -> None:
    """NVRTC and its binding: else a pool of threads would gain nothing."""
    pytest.importorskip("cuda.bindings.nvrtc")
    variants = list(itertools.islice(symm_build.simulation_variants(), 12))
    missed: list[Defines] = []
    with compiled_up_front(variants, "sm_90", missed):
        cubins = {kernels.compile_source(defines, "sm_90") for defines in variants}
    assert not missed and all(cubin[:4] == b"\x7fELF" for cubin in cubins)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
