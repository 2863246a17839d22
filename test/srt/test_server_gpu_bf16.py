"""Live servers on two GPUs in bf16, decode in CUDA graphs: DCP against tp-only.

Only here do the 16-bit attention kernels, graph capture and NCCL meet. In bf16 two
tensor-parallel widths already differ, so that is the measure: the log-probabilities of
the tokens that both servers chose alike may be no further from tp 1 than plain tp 2's,
times a margin for the small sample. A wrong head or slot moves them by whole units.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

import e2e
from gpu import needs_gpus
from servers import READY_SECONDS
from sglang_dcp.demo.client import Reply, http_json
from sglang_dcp.demo.server import ServerProcess
from sglang_dcp.demo.tiny_model import make_tiny_model

pytestmark = [pytest.mark.server, needs_gpus(2)]

KIND = os.environ.get("SGLANG_DCP_TEST_KIND", "llama-2kv-d128")
PER_RANK = 16384
COMMON = (
    "--dtype bfloat16 --random-seed 0 --sampling-backend pytorch --log-level info "
    f"--max-total-tokens {PER_RANK} --mem-fraction-static 0.3 --cuda-graph-max-bs 16"
)
BASE = {"tp1": "--tp 1", "tp2": "--tp 2"}
TP2 = "--tp 2 --dcp-size 2 --attention-backend"
TP4 = "--tp 4 --attn-tp-size 2 --attention-backend"
DCP = {
    "fa3-a2a-replicated": f"{TP2} fa3 --dcp-comm-backend a2a --dcp-replicate-q-proj",
    "fa3-ag_rs-page16-chunk256": f"{TP2} fa3 --page-size 16 "
    "--chunked-prefill-size 256 --enable-mixed-chunk",
    "triton-a2a": f"{TP2} triton --dcp-comm-backend a2a",
    "triton-ag_rs-replicated-eager": f"{TP2} triton --dcp-replicate-q-proj "
    "--disable-cuda-graph",
    "tp4-fa3-a2a": f"{TP4} fa3 --dcp-comm-backend a2a",
    "tp4-triton-ag_rs-replicated": f"{TP4} triton --dcp-replicate-q-proj",
    # KVP 4: requests of two tokens leave two ranks without a key, in the graph too.
    "tp4-kvp4-fa3-a2a": "--tp 4 --dcp-size 4 --attention-backend fa3 "
    "--dcp-comm-backend a2a --dcp-replicate-q-proj",
    "tp4-kvp4-triton-ag_rs": "--tp 4 --dcp-size 4 --attention-backend triton",
}
WIDE = {name for name in DCP if name.startswith("tp4")}
# Of the mean over some 300 tokens; tp 2 against tp 1 is one draw of the same spread.
MARGIN = 1.5


def can_run(name: str) -> bool:
    import torch

    return name not in WIDE or torch.cuda.device_count() >= 4


def requests() -> list[e2e.Request]:
    """The usual ones, and long ragged prompts."""
    draw = random.Random(7)
    longer = [
        e2e.Request(f"long-{n}", tuple(draw.randrange(256) for _ in range(n)), 12, True)
        for n in (1023, 2048, 3001, 6500)
    ]
    return e2e.build_requests() + longer


@pytest.fixture(scope="module")
def replies(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[str, list[Reply]]]:
    """Answers of the selected cases' servers and of plain tp 1 and tp 2.

    All start at once, as a start is mostly one core's work.
    """
    items = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = {item.callspec.params["name"] for item in items}  # type: ignore[attr-defined]
    folder = tmp_path_factory.mktemp("bf16")
    model = make_tiny_model(folder / KIND, KIND)
    flags = {name: f"--attention-backend fa3 {flag}" for name, flag in BASE.items()}
    flags |= {name: DCP[name] for name in DCP if name in chosen and can_run(name)}
    with ExitStack() as stack:
        fleet = {
            name: stack.enter_context(_server(model, folder, name, flag))
            for name, flag in flags.items()
        }
        answers = {}
        for name, server in fleet.items():
            server.wait_ready(READY_SECONDS)
            answers[name] = e2e.run_requests(server.base_url, requests())
            _check_report(name, server)
        yield answers


def _server(model: Path, folder: Path, name: str, flags: str) -> ServerProcess:
    return ServerProcess(
        model,
        [*COMMON.split(), *flags.split()],
        log_path=folder / f"{name}.log",
        grace=0.0,
        device="cuda",
    )


def _check_report(name: str, server: ServerProcess) -> None:
    info = http_json(f"{server.base_url}/server_info")
    times = 1 if name in BASE else 4 if "kvp4" in name else 2
    assert info["max_total_num_tokens"] == times * PER_RANK, name
    log = server.log_path.read_text(errors="replace")
    assert "leak" not in log.lower(), name


def distances(got: Sequence[Reply], want: Sequence[Reply]) -> list[float]:
    """|d log-probability| of the tokens up to where the greedy choices part."""
    found = []
    for a, b in zip(got, want, strict=True):
        for id_a, id_b, lp_a, lp_b in zip(a.ids, b.ids, a.logprobs, b.logprobs):
            if id_a != id_b:
                break
            found.append(abs(lp_a - lp_b))
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_gpus(4) if n in WIDE else ()) for n in DCP],
)
def test_within_the_spread_of_tp(name: str, replies: dict[str, list[Reply]]) -> None:
    spread = distances(replies["tp2"], replies["tp1"])
    found = distances(replies[name], replies["tp1"])
    print(
        f"{KIND} {name}: |d logprob| mean {statistics.mean(found):.4f} max "
        f"{max(found):.3f} over {len(found)} tokens; tp 2 - tp 1: mean "
        f"{statistics.mean(spread):.4f} max {max(spread):.3f} over {len(spread)}"
    )
    assert len(found) > 0.7 * len(spread)
    assert statistics.mean(found) < MARGIN * statistics.mean(spread)
    assert max(found) < 2 * MARGIN * max(spread)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
