"""A live server without DCP flags: the installed package changes nothing.

Also what a request needs that no DCP rank count grants: a prompt longer than the pool
of a tp 1 server is refused there, and served by `test_server_equality.py` at dcp 2.
"""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path

import pytest

from helpers import request_set
from helpers.servers import READY_SECONDS, launched, plugin_folder, server
from sglang_dcp.demo.client import Reply, greedy, http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = pytest.mark.server

FLAGS = "--tp 1 --attention-backend torch_native --max-total-tokens 300"

# What a CPU server needs to start at all, written here apart from the package.
SHIM = """
def load():
    from sglang.srt.layers.rotary_embedding import base
    base._is_cpu = True
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama-2kv", "llama-2kv")


def test_bit_identical_to_sglang_alone_and_bounded_by_its_pool(
    model: Path, tmp_path: Path
) -> None:
    requests = [
        r for r in request_set.build_requests() if len(r.ids) < 200 and not r.concurrent
    ]
    env = plugin_folder(tmp_path, "rope_shim", SHIM)
    env["SGLANG_PLUGINS"] = "rope_shim"
    packaged_server = server(model, FLAGS, fresh=True)
    with launched(model, FLAGS, env) as alone, packaged_server as packaged:
        ours = request_set.run_requests(packaged.base_url, requests)
        info = http_json(f"{packaged.base_url}/server_info")
        too_long = _refusal(packaged, 397)
        packaged.stop()
        alone.wait_ready(READY_SECONDS)
        theirs: list[Reply] = request_set.run_requests(alone.base_url, requests)
        alone_info = http_json(f"{alone.base_url}/server_info")
    assert ours == theirs
    assert info["attn_tp_size"] is None and "attn_tp_size" not in alone_info
    same = ("page_size", "max_total_num_tokens", "dcp_size", "chunked_prefill_size")
    assert {k: info[k] for k in same} == {k: alone_info[k] for k in same}
    assert too_long == 400


def _refusal(running: ServerProcess, prompt_tokens: int) -> int:
    """HTTP status of a prompt longer than the server's pool."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        greedy(running.base_url, [[65] * prompt_tokens], 8)
    return caught.value.code


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
