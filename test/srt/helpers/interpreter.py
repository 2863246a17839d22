"""Kernels in Triton's interpreter, which a process must ask for before it imports Triton."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.gloo_ranks import run_python


def results_of(file: str) -> Any:
    """Return what `file`'s worker prints as JSON, where Triton interprets its kernels."""
    pytest.importorskip("triton", reason="needs triton")
    done = run_python(file, "--worker", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.code == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
