"""CUDA's run-time compiler (NVRTC), through the bindings that SGLang depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def compile_cubin(source: Path, defines: Mapping[str, int], arch: str) -> bytes:
    """Compile a file without includes for `arch`, for example "sm_90".

    It needs no GPU and is safe in several threads at once.

    Raises
    ------
    RuntimeError
        The file does not compile. The message has the compiler's log.
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
    # NVRTC writes into it, and Python shares `bytes` objects of length 0 and 1.
    cubin = bytearray(size)
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return bytes(cubin)


def checked(returned: Sequence[Any]) -> Sequence[Any]:
    """Return what a call of CUDA's bindings returned after its status.

    Raises RuntimeError if the status is an error.
    """
    status, *values = returned
    if int(status):
        raise RuntimeError(f"CUDA: {status!r}")
    return values
