"""When the demo and the tests take a server for ready.

Only this file catches a server that answers late and is taken for a foreign one.
"""

from __future__ import annotations

import sys
from typing import Optional

import pytest

from sglang_dcp.demo import server as module
from sglang_dcp.demo.server import ServerFailed, ServerProcess


def ready(info: Optional[bytes], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Ask a server that has generated a token, with this answer to /model_info."""
    server = ServerProcess("/models/mine")
    monkeypatch.setattr(server, "_listens", lambda: True)
    answers = {"health_generate": b"", "model_info": info}
    monkeypatch.setattr(module, "_fetch", lambda url: answers[url.rsplit("/", 1)[1]])
    return server._is_ready()


def test_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ready(b'{"model_path": "/models/mine"}', monkeypatch)


def test_no_answer_is_not_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ready(None, monkeypatch)


def test_another_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerFailed, match="serves /models/other, not /models/mine"):
        ready(b'{"model_path": "/models/other"}', monkeypatch)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
