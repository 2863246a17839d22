"""Fixtures of all test files: a clean DCP context, SGLang with its plugins, a model."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

from sglang_dcp import context


@pytest.fixture(autouse=True)
def no_context() -> Iterator[None]:
    """Each test starts and ends in a process where DCP is off."""
    context.clear_context()
    yield
    context.clear_context()


@pytest.fixture(scope="session")
def plugins() -> None:
    """SGLang's own loader has put every seam in place in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a checkpoint with 8 query heads and 2 K/V heads."""
    from sglang_dcp.demo.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama-2kv"))
