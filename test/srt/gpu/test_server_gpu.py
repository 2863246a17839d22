"""Live servers on GPUs, in float32: DCP over two GPUs = tp 1 on one = transformers.

Only here do SGLang's CUDA path, its overlap streams and K/V kernels meet ours. The CPU
tests' oracle is as strict here, because float32 is served with torch's own operators: the
kernels that SGLang uses for norm, activation and rotary embedding take 16-bit types only.
All servers start at once, as most of a start is one core's work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import request_set
from helpers.nccl_ranks import needs_gpus
from helpers.servers import READY_SECONDS, plugin_folder
from sglang_dcp.demo.client import http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = [pytest.mark.server, needs_gpus(2)]

MAX_TOTAL_TOKENS = 4096
COMMON = (
    "--dtype float32 --random-seed 0 --attention-backend torch_native "
    "--disable-cuda-graph --sampling-backend pytorch "
    f"--max-total-tokens {MAX_TOTAL_TOKENS}"
)
FLOAT32 = """
def load():
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for operator in (RMSNorm, SiluAndMul, RotaryEmbedding):
        operator.forward_cuda = operator.forward_native
"""
# tp 1 only: SGLang has no torch_native MLA on a GPU and treats it as triton, whose prefill
# leaves K/V where torch_native does not read them. With DCP, absorbing is a hook of ours.
ABSORBED = (
    FLOAT32
    + """
    from sglang.srt.models.deepseek_common import attention_backend_handler
    from sglang.srt.models.deepseek_common.attention_forward_methods import (
        forward_methods,
    )

    attention_backend_handler.AttentionBackendRegistry.register(
        "triton", lambda attention, batch: forward_methods.AttnForwardMethod.MLA
    )
"""
)


@dataclass(frozen=True)
class Case:
    """One model; `dcp` are the flags beside `COMMON`, `tp1_gpu` is where tp 1 runs."""

    kind: str
    dcp: str
    tp1_gpu: int
    page_size: int = 1


CASES = {
    "llama-2kv-a2a-chunk64-mixed": Case(
        "llama-2kv",
        "--dcp-comm-backend a2a --chunked-prefill-size 64 --enable-mixed-chunk",
        tp1_gpu=0,
    ),
    # No MoE: SGLang's router on CUDA multiplies 16-bit types only.
    "mla-dense-ag_rs-replicated-page4": Case(
        "mla-dense", "--dcp-replicate-q-proj --page-size 4", tp1_gpu=1, page_size=4
    ),
}


class Fleet:
    """tp 1 and DCP servers of every case, all started by the first test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._plugins = {
            name: self._plugin(name, source)
            for name, source in (("float32", FLOAT32), ("absorbed", ABSORBED))
        }
        self.tp1: dict[str, ServerProcess] = {}
        self.dcp: dict[str, ServerProcess] = {}
        for name, case in CASES.items():
            flags = f"--tp 2 --dcp-size 2 {case.dcp}"
            self.dcp[name] = self._start("dcp", case, flags, self._plugins["float32"])
            where = {"CUDA_VISIBLE_DEVICES": str(case.tp1_gpu)}
            plugin = "absorbed" if case.kind.startswith("mla") else "float32"
            env = {**self._plugins[plugin], **where}
            self.tp1[name] = self._start("tp1", case, "--tp 1", env)

    def model(self, case: Case) -> Path:
        return make_tiny_model(self._folder / case.kind, case.kind)

    def _plugin(self, name: str, source: str) -> dict[str, str]:
        folder = self._folder / f"plugin-{name}"
        folder.mkdir()
        path = plugin_folder(folder, name, source)["PYTHONPATH"]
        inherited = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join(filter(None, (path, inherited)))}

    def _start(
        self, role: str, case: Case, flags: str, env: Mapping[str, str]
    ) -> ServerProcess:
        server = ServerProcess(
            self.model(case),
            [*COMMON.split(), *flags.split()],
            log_path=self._folder / f"{case.kind}-{role}.log",
            env=env,
            grace=5.0,
            device="cuda",
        )
        return self._stack.enter_context(server)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(tmp_path_factory.mktemp("fleet"), stack)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_tp1_and_to_transformers(name: str, fleet: Fleet) -> None:
    case, requests = CASES[name], request_set.build_requests()
    oracle = request_set.hf_reference(fleet.model(case), requests)
    replies = []
    for server in (fleet.tp1[name], fleet.dcp[name]):
        server.wait_ready(READY_SECONDS)
        replies.append(request_set.run_requests(server.base_url, requests))
    tp1, dcp = replies
    request_set.assert_equal_to_reference(requests, tp1, oracle)
    request_set.assert_equal_to_reference(requests, dcp, tp1)
    print(
        f"{name}: max |d logprob| DCP - tp 1 {request_set.max_difference(dcp, tp1):.1e}, "
        f"tp 1 - transformers {request_set.max_difference(tp1, oracle):.1e}"
    )


@pytest.mark.parametrize("name", CASES)
def test_layout_and_capacity(name: str, fleet: Fleet) -> None:
    case, server = CASES[name], fleet.dcp[name]
    server.wait_ready(READY_SECONDS)
    info = http_json(f"{server.base_url}/server_info")
    log = server.log_path.read_text(errors="replace")
    assert info["device"] == "cuda" and info["attn_tp_size"] == 1
    page = 2 * case.page_size
    per_rank = MAX_TOTAL_TOKENS // page * page
    assert info["max_total_num_tokens"] == 2 * per_rank
    assert f"KV tokens: {per_rank} per rank, {2 * per_rank} in all" in log
    assert "leak" not in log.lower()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
