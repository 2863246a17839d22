"""Builds and launches the kernels of ``symm_a2a.cu``.

NVRTC compiles one variant in about 0.2 s. So each process builds what it uses, and nothing
is cached on disk. A variant is built when it is first needed, which must not be inside a
graph capture. SGLang runs each step eagerly before it captures it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from sglang_dcp.distributed.exchange.symm_a2a.nvrtc import checked, compile_cubin

# Threads of a block. Each moves 16 bytes of a chunk. The layout of the inboxes needs it.
THREADS = 128
VECTOR_BYTES = 16
MAX_ROWS = 32
CHUNK_BYTES = THREADS * VECTOR_BYTES + MAX_ROWS * 4
MAX_WORLD_SIZE = 8
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_SOURCE = Path(__file__).with_name("symm_a2a.cu")


def fits_row(row_bytes: int) -> bool:
    """Whether the kernels can move rows of this size: whole vectors, at most one block."""
    return row_bytes % VECTOR_BYTES == 0 and 0 < row_bytes <= THREADS * VECTOR_BYTES


def chunks_of(rows: int, row_bytes: int) -> int:
    """Count the chunks that ``rows`` rows take in an inbox."""
    return -(-rows // min(THREADS * VECTOR_BYTES // row_bytes, MAX_ROWS))


@dataclass(frozen=True)
class Workspace:
    """What all calls of one rank share; ``symm_a2a.cu`` describes the protocol.

    Attributes
    ----------
    inboxes : addresses of all ranks' inboxes, in rank order, as mapped on this rank;
        each has ``inbox_bytes`` and is filled with 0xFF before any rank launches
    uses : [chunks] int32 on the device, zero at first; how often each chunk was used
    fault : [2] int32, pinned, zero at first; 1 + rank and 1 + peer of a wait that failed
    rank : this rank's index in the group
    timeout_s : seconds that a kernel waits for a peer before it ends the CUDA context
    max_blocks : most blocks of a launch; 0 for as many as fit on the device at once
    owned : objects that keep the memory behind the addresses alive
    """

    inboxes: Sequence[int]
    uses: Tensor
    fault: Tensor
    rank: int
    timeout_s: float
    max_blocks: int = 0
    owned: object = None

    @property
    def world_size(self) -> int:
        return len(self.inboxes)

    @property
    def chunks(self) -> int:
        return len(self.uses)


def inbox_bytes(world_size: int, chunks: int) -> int:
    """Return the size of one rank's inbox: two slots for each sender and chunk."""
    return 2 * world_size * chunks * CHUNK_BYTES


class _PartialArgument(ctypes.Structure):
    """``Partial`` of ``symm_a2a.cu``, field by field."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("empty", ctypes.c_void_p),
        ("out_token", ctypes.c_int64),
        ("out_head", ctypes.c_int64),
        ("lse_token", ctypes.c_int64),
        ("lse_head", ctypes.c_int64),
        ("heads", ctypes.c_int),
    ]


@lru_cache(maxsize=None)
def _workspace_type(world_size: int) -> type[ctypes.Structure]:
    """``Workspace`` of ``symm_a2a.cu``, field by field."""

    class WorkspaceArgument(ctypes.Structure):
        _fields_ = [
            ("inboxes", ctypes.c_uint64 * world_size),
            ("uses", ctypes.c_void_p),
            ("timeout_ns", ctypes.c_uint64),
            ("fault", ctypes.c_void_p),
            ("chunks", ctypes.c_int64),
        ]

    return WorkspaceArgument


def _argument(workspace: Workspace) -> ctypes.Structure:
    kind = _workspace_type(workspace.world_size)
    return kind(
        (ctypes.c_uint64 * workspace.world_size)(*workspace.inboxes),
        workspace.uses.data_ptr(),
        int(workspace.timeout_s * 1e9),
        workspace.fault.data_ptr(),
        workspace.chunks,
    )


def reduce_heads(
    workspace: Workspace,
    partial_out: Tensor,
    lse: Tensor,
    empty_rows: Optional[Tensor],
    out: Tensor,
    merged_lse: Optional[Tensor],
    is_lse_base_on_e: bool,
) -> None:
    """Exchange and merge partial outputs, in one launch on the current stream.

    Safe in CUDA-graph capture if the variant is built already. Heads are in rank order.

    Parameters
    ----------
    partial_out : [tokens, N * heads, head_dim]; fp16, bf16 or fp32; rows contiguous and at
        multiples of 16 bytes, other strides free
    lse : [tokens, N * heads] float32, any strides
    empty_rows : [tokens] bool, rows whose LSE counts as -inf whatever it holds, or None
    out : [tokens, heads, head_dim], contiguous, of ``partial_out.dtype``; written
    merged_lse : [tokens, heads] float32, contiguous, or None; written
    is_lse_base_on_e : True if both LSEs are natural logs, False if they are base 2
    """
    tokens, heads, head_dim = out.shape
    kernel = _built(
        "reduce_heads",
        workspace.world_size,
        workspace.rank,
        _vectors(head_dim * out.itemsize),
        ELEMENTS[out.dtype],
        is_lse_base_on_e,
    )
    size = out.itemsize
    partial = _PartialArgument(
        partial_out.data_ptr(),
        lse.data_ptr(),
        None if empty_rows is None else empty_rows.data_ptr(),
        partial_out.stride(0) * size,
        partial_out.stride(1) * size,
        lse.stride(0),
        lse.stride(1),
        heads,
    )
    merged = None if merged_lse is None else merged_lse.data_ptr()
    kernel.launch(
        workspace,
        tokens * heads,
        (
            partial,
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(merged),
            ctypes.c_int(tokens * heads),
        ),
    )


def gather_heads(workspace: Workspace, own: Tensor, out: Tensor) -> None:
    """Gather the heads of all ranks, in one launch on the current stream.

    Safe in CUDA-graph capture if the variant is built already. A NaN may arrive as
    another NaN.

    Parameters
    ----------
    own : [tokens, heads, head_dim], this rank's local heads; one of
        `symm_a2a.GATHERED_DTYPES`; rows contiguous and at multiples of 16 bytes
    out : [tokens, N * heads, head_dim], contiguous, heads in rank order; written
    """
    tokens, heads, head_dim = own.shape
    size = own.itemsize
    kernel = _built(
        "gather_heads",
        workspace.world_size,
        workspace.rank,
        _vectors(head_dim * size),
    )
    kernel.launch(
        workspace,
        tokens * heads,
        (
            ctypes.c_void_p(own.data_ptr()),
            ctypes.c_int64(own.stride(0) * size),
            ctypes.c_int64(own.stride(1) * size),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int(heads),
            ctypes.c_int(tokens * heads),
        ),
    )


def _vectors(row_bytes: int) -> int:
    if not fits_row(row_bytes):
        raise ValueError(
            f"rows of {row_bytes} bytes: symm_a2a moves whole vectors of {VECTOR_BYTES} "
            f"bytes, and rows of up to {THREADS * VECTOR_BYTES} bytes"
        )
    return row_bytes // VECTOR_BYTES


class _Kernel:
    """One built variant of a kernel."""

    def __init__(self, function: Any, vectors: int, resident_blocks: int) -> None:
        self._function = function
        self._row_bytes = vectors * VECTOR_BYTES
        self._resident_blocks = resident_blocks

    def launch(self, workspace: Workspace, rows: int, arguments: Sequence[Any]) -> None:
        from cuda.bindings import driver

        chunks = chunks_of(rows, self._row_bytes)
        if chunks > workspace.chunks:
            raise ValueError(
                f"{rows} rows of {self._row_bytes} bytes take {chunks} chunks, and the "
                f"inbox has {workspace.chunks}"
            )
        blocks = min(chunks, workspace.max_blocks or self._resident_blocks)
        values = (_argument(workspace), *arguments)
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        checked(
            driver.cuLaunchKernel(
                self._function,
                *(blocks, 1, 1),
                *(THREADS, 1, 1),
                *(0, stream),
                *(ctypes.addressof(pointers), 0),
            )
        )


@lru_cache(maxsize=None)
def _built(
    name: str,
    world_size: int,
    rank: int,
    vectors: int,
    element: Optional[int] = None,
    base_e: bool = False,
) -> _Kernel:
    from cuda.bindings import driver

    defines = {"WORLD": world_size, "RANK": rank, "THREADS": THREADS}
    defines["VECTORS"] = vectors
    if element is not None:
        defines |= {"ELEMENT": element, "BASE_E": int(base_e)}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    cubin = compile_source(defines, f"sm_{properties.major}{properties.minor}")
    [module] = checked(driver.cuModuleLoadData(cubin))
    [function] = checked(driver.cuModuleGetFunction(module, name.encode()))
    [blocks] = checked(
        driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, THREADS, 0)
    )
    return _Kernel(function, vectors, blocks * properties.multi_processor_count)


def compile_source(defines: dict[str, int], arch: str) -> bytes:
    """Compile a variant to a cubin; needs no GPU.

    Raises RuntimeError with the compiler's log.
    """
    return compile_cubin(_SOURCE, defines, arch)
