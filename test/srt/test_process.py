"""What a scheduler process sets up before it starts NCCL."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from sglang_dcp import process

MIXING = "NCCL_GRAPH_MIXING_SUPPORT"
DCP = {"tp_size": 2, "dcp_size": 2}
WIDE = {"tp_size": 4, "dcp_size": 2}

pytestmark = pytest.mark.usefixtures("plugins")


@pytest.mark.parametrize(
    ("arguments", "before", "after"),
    [
        pytest.param({}, None, None, id="dcp-off"),
        pytest.param(DCP, None, "0", id="dcp-on"),
        pytest.param(DCP, "1", "1", id="user-value"),
        pytest.param({**WIDE, "ep_size": 4}, None, "0", id="ep-is-tp"),
        pytest.param({**WIDE, "ep_size": 2}, None, None, id="ep-within-tp"),
    ],
)
def test_nccl_graph_mixing(
    arguments: dict[str, Any],
    before: str | None,
    after: str | None,
    server_args: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = server_args(**arguments)
    with monkeypatch.context() as patch:
        # Set and deleted through the patch, so that what was there before comes back.
        patch.setenv(MIXING, before or "")
        if before is None:
            patch.delenv(MIXING)
        process.configure_scheduler_process(args, 0, 1)
        assert os.environ.get(MIXING) == after


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
