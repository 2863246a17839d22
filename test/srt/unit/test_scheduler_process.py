"""What a scheduler process sets up before it starts NCCL."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from helpers.server_args import as_server_info, configure_scheduler
from sglang_dcp.context import DcpContext, get_context
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version

MIXING = "NCCL_GRAPH_MIXING_SUPPORT"
DCP = {"tp_size": 2, "dcp_size": 2}
WIDE = {"tp_size": 4, "dcp_size": 2}
REPLICAS = {"enable_dp_attention": True, "dp_size": 2}
SERVES_REPLICAS = pytest.mark.skipif(
    not in_range(sglang_version(), "0.5.23", None),
    reason="DCP refuses DP attention with this SGLang",
)

pytestmark = pytest.mark.usefixtures("plugins")


@pytest.mark.parametrize(
    ("arguments", "before", "after"),
    [
        pytest.param({}, None, None, id="dcp-off"),
        pytest.param(DCP, None, "0", id="dcp-on"),
        pytest.param(DCP, "1", "1", id="user-value"),
        pytest.param({**WIDE, "ep_size": 4}, None, "0", id="ep-is-tp"),
        # SGLang would turn mixing off: what DCP sets keeps NCCL's default.
        pytest.param({**WIDE, "ep_size": 2}, None, "1", id="ep-within-tp"),
        pytest.param(
            {**WIDE, **REPLICAS}, None, "1", id="dp-attention", marks=SERVES_REPLICAS
        ),
    ],
)
def test_nccl_graph_mixing(
    arguments: dict[str, Any],
    before: str | None,
    after: str | None,
    server_args: Any,
    tiny_qwen3: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = {"model_path": tiny_qwen3, **arguments}
    with monkeypatch.context() as patch:
        # Set and deleted through the patch, so that what was there before comes back.
        patch.setenv(MIXING, before or "")
        if before is None:
            patch.delenv(MIXING)
        configure_scheduler(server_args(**arguments), 0)
        assert os.environ.get(MIXING) == after


def test_dcp_size_is_the_users_until_a_scheduler_has_it(server_args: Any) -> None:
    """The log and /server_info show it; SGLang's own DCP must not see it."""
    args = server_args(**DCP)
    assert (args.dcp_size, as_server_info(args)["dcp_size"]) == (2, 2)
    assert "dcp_size=2," in repr(args)
    configure_scheduler(args, 1)
    assert sglang_api().resolved(args).dcp_size == 1
    assert get_context() == DcpContext(args.dcp, 1)
    plain = server_args()
    configure_scheduler(plain, 0)
    assert sglang_api().resolved(plain).dcp_size == 1


@SERVES_REPLICAS
@pytest.mark.parametrize(("tp_rank", "wanted"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_a_rank_counts_inside_its_replica(
    tp_rank: int, wanted: int, server_args: Any, tiny_qwen3: str
) -> None:
    args = server_args(model_path=tiny_qwen3, **WIDE, **REPLICAS)
    configure_scheduler(args, tp_rank)
    assert get_context() == DcpContext(args.dcp, wanted)
    assert get_context().dcp_rank == wanted and get_context().attn_tp_rank == 0


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
