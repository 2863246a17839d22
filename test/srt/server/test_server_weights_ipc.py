"""New weights over IPC for live servers with replicated Q, against transformers.

Only here does `/update_weights_from_ipc` meet DCP on a CPU. All ranks receive the weights in
buckets, over ZMQ and shared memory, by SGLang's own code but for the receiver of
`helpers.ipc_weights`. An update that fails half-way comes first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers import ipc_weights, request_set
from helpers.ipc_weights import Named
from helpers.servers import server
from helpers.weight_updates import send_over_ipc, stored
from sglang_dcp.demo.tiny_model import make_tiny_model
from sglang_dcp.releases.installed import in_range, sglang_version

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        not in_range(sglang_version(), "0.5.23", None),
        reason="the receiver was written for the code of 0.5.23",
    ),
]

RANKS = 2
FLAGS = (
    f"--tp {RANKS} --dcp-size {RANKS} --dcp-comm-backend a2a --dcp-replicate-q-proj "
    "--max-total-tokens 4096 --page-size 4"
)
# Among them a prompt that is sent again, and prompts that share a prefix with it.
REQUESTS = request_set.build_requests()[4:14]
# SGLang refuses it with another number of entries. It lies in the last bucket.
REFUSED = "model.norm.weight"


@pytest.mark.parametrize(
    "kind", ["mla-v3", pytest.param("llama-2kv", marks=pytest.mark.long)]
)
def test_updated_weights_answer_as_transformers(kind: str, tmp_path: Path) -> None:
    old, new = (
        make_tiny_model(tmp_path / f"seed{seed}", kind, seed=seed) for seed in (0, 1)
    )
    named = stored(new)
    # Other weights, so that what this update leaves cannot pass for the next one.
    broken = [(n, t[:-1] if n == REFUSED else 2 * t) for n, t in named]
    wanted = request_set.hf_reference(new, REQUESTS)
    with server(old, FLAGS, ipc_weights.stand_in(tmp_path)) as dcp:
        before = request_set.run_requests(dcp.base_url, REQUESTS)
        with pytest.raises(AssertionError, match="into parameter"):
            update(dcp.base_url, broken, tmp_path / "broken")
        update(dcp.base_url, named, tmp_path / "whole")
        after = request_set.run_requests(dcp.base_url, REQUESTS)
        log = dcp.log_path.read_text(errors="replace")
    assert request_set.max_difference(before, wanted) > 0.1
    request_set.assert_equal_to_reference(REQUESTS, after, wanted)
    assert ipc_weights.FAILED not in log
    print(f"max |d logprob| {request_set.max_difference(after, wanted):.2e}")


def update(base_url: str, named: Sequence[Named], folder: Path) -> None:
    """Send the weights to all ranks, through files in a new folder."""
    folder.mkdir()
    size, ranks = ipc_weights.room(named), range(RANKS)
    shared = {
        ipc_weights.cpu_key(rank): ipc_weights.on_cpu(folder / f"rank{rank}", size)
        for rank in ranks
    }
    send_over_ipc(base_url, named, shared)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
