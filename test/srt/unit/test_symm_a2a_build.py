"""Every variant of `symm_a2a.cu` compiles for Hopper, without a GPU.

Only this file sees a variant that does not compile, warns, or spills registers, before a
server meets it in its first decode step.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sglang_dcp.distributed.exchange.symm_a2a import kernel as kernels

nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

ARCH = "sm_90"
DIMS = (64, 96, 128, 192, 256, 512)
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
# Of queries: MLA's have 576 values, in bf16 and in fp8.
GATHERED_BYTES = (64, 128, 192, 256, 384, 512, 576, 1024, 1152, 2048)
PLACES = [
    *((2, rank) for rank in range(2)),
    *((world_size, world_size // 2) for world_size in range(3, 8)),
    *((8, rank) for rank in range(8)),
]
Defines = dict[str, int]


def reduce_variants() -> Iterator[tuple[str, Defines]]:
    """All of them for one rank of 2 and of 8; elsewhere sizes and dtypes take turns."""
    sizes = [*itertools.product(DIMS, enumerate(ITEM_BYTES), (0, 1))]
    for i, (world_size, rank) in enumerate(PLACES):
        whole = (world_size, rank) in ((2, 0), (8, 7))
        for dim, (element, dtype), base_e in sizes if whole else sizes[i % 7 :: 7]:
            name = f"reduce-N{world_size}-r{rank}-D{dim}-{dtype}-{'2e'[base_e]}"
            defines = common(world_size, rank, dim * ITEM_BYTES[dtype])
            yield name, {**defines, "ELEMENT": element, "BASE_E": base_e}


def gather_variants() -> Iterator[tuple[str, Defines]]:
    for (world_size, rank), size in itertools.product(PLACES, GATHERED_BYTES):
        if rank in (0, world_size // 2, 7):
            name = f"gather-N{world_size}-r{rank}-{size}B"
            yield name, common(world_size, rank, size)


def common(world_size: int, rank: int, row_bytes: int) -> Defines:
    vectors = row_bytes // kernels.VECTOR_BYTES
    names = ("WORLD", "RANK", "THREADS", "VECTORS")
    return dict(zip(names, (world_size, rank, kernels.THREADS, vectors)))


VARIANTS = {**dict(reduce_variants()), **dict(gather_variants())}


def compiled(defines: Defines) -> tuple[bytes, str]:
    """The cubin, and what the compiler said although it went on."""
    destroy, said = nvrtc.nvrtcDestroyProgram, []

    def read_then_destroy(program: Any) -> Any:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        said.append(log.decode().strip("\0 \n"))
        return destroy(program)

    with patch.object(nvrtc, "nvrtcDestroyProgram", read_then_destroy):
        cubin = kernels.compile_source(defines, ARCH)
    return cubin, "".join(said)


def test_compiling_leaves_pythons_own_bytes_as_they_are() -> None:
    """An empty log has one byte; written into `b" "`, it changed every space after it."""
    compiled(next(iter(VARIANTS.values())))
    assert b"a b"[1:2][0] == 0x20


def cuobjdump() -> Path:
    """Triton's, which comes with SGLang."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"needs {tool.name} of Triton")
    return tool


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_warning_or_spill(name: str, tmp_path: Path) -> None:
    cubin, said = compiled(VARIANTS[name])
    assert not said
    file = tmp_path / "cubin"
    file.write_bytes(cubin)
    command = [str(cuobjdump()), "-res-usage", str(file)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    assert found[1] == f"{name.split('-')[0]}_heads"
    # Rather than hold one block less ptxas puts up to four values aside.
    assert int(found[3]) <= 16 and found[4] == "0", usage
    # Two blocks a multiprocessor at the very least: 64 K registers.
    assert int(found[2]) * kernels.THREADS * 2 <= 65536


def test_a_warning_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "symm_a2a.cu"
    text = "__global__ void f() { int unused; }"
    source.write_text(kernels._SOURCE.read_text() + text)
    with patch.object(kernels, "_SOURCE", source):
        _, said = compiled(common(2, 0, 256))
    assert "unused" in said


def test_a_source_that_does_not_compile_is_an_error_with_the_log(
    tmp_path: Path,
) -> None:
    source = tmp_path / "symm_a2a.cu"
    source.write_text("__global__ void f() { undefined_name(); }")
    with patch.object(kernels, "_SOURCE", source):
        with pytest.raises(RuntimeError, match="undefined_name"):
            kernels.compile_source({}, ARCH)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
