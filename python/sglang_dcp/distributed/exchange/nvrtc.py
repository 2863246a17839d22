"""CUDA's run-time compiler, through NVIDIA's Python bindings (SGLang depends on them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def compile_cubin(source: Path, defines: Mapping[str, int], arch: str) -> bytes:
    """Compile a file without includes, for `arch` (as "sm_90"); needs no GPU.

    Safe in several threads at once.

    Raises
    ------
    RuntimeError
        The file does not compile; with the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "--std=c++17", "-lineinfo"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    encoded = [option.encode() for option in options]
    created = nvrtc.nvrtcCreateProgram(
        source.read_bytes(), source.name.encode(), 0, None, None
    )
    [program] = checked(created)
    [failed] = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if failed:
        [size] = checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = bytearray(size)
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source.name} does not compile:\n{log.decode()}")
    [size] = checked(nvrtc.nvrtcGetCUBINSize(program))
    # Not `bytes`, which Python shares where they are empty or a single one.
    cubin = bytearray(size)
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def checked(returned: Sequence[Any]) -> Sequence[Any]:
    """What a call of CUDA's bindings returned behind its status; RuntimeError for a bad one."""
    status, *values = returned
    if int(status):
        raise RuntimeError(f"CUDA: {status!r}")
    return values
