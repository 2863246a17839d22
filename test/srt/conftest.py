"""Fixtures of all test files: a clean DCP context, SGLang with its plugins, a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterator

import pytest

from helpers.server_args import resolve_server_args
from sglang_dcp import context

# Test files are their own workers: child processes must find what setup.cfg's
# `pythonpath` gives to this one.
_TESTS = Path(__file__).parent
_PATHS = (
    os.environ.get("PYTHONPATH"),
    str(_TESTS),
    str(_TESTS.parents[1] / "benchmark"),
)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its level, the name of its folder."""
    for item in items:
        item.add_marker(item.path.parent.name)


@pytest.fixture(autouse=True)
def no_context() -> Iterator[None]:
    """Each test starts and ends in a process where DCP is off."""
    context.clear_context()
    yield
    context.clear_context()


@pytest.fixture(scope="session")
def plugins() -> None:
    """SGLang's own loader has installed every hook in this process."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture
def server_args(plugins: None, tiny_llama: str) -> Iterator[Any]:
    """Make SGLang's resolved `ServerArgs` for the tiny model; the environment is put back.

    The class is looked up as SGLang does, so it is ours where the plugin was loaded.
    """
    from sglang.srt import server_args as module

    def make(**arguments: Any) -> Any:
        common = {"model_path": tiny_llama, "device": "cpu", "random_seed": 1}
        return resolve_server_args(module.ServerArgs(**{**common, **arguments}))

    before = dict(os.environ)
    yield make
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a checkpoint with 8 query heads and 2 K/V heads."""
    from sglang_dcp.demo.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama-2kv"))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a checkpoint of a model that SGLang serves with DP attention."""
    from sglang_dcp.demo.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "m", "qwen3"))
