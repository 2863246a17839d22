"""Qwen3-MoE with SGLang's fused RoPE and K/V write put back under DCP.

The fused kernel writes logical slots into a rank's pool. A server where our hook was
undone must refuse to start; and where that check is blinded too, the log-probabilities
must go wrong by more than the bound that the same server otherwise keeps. Without the
second half the first would guard nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers import teacher_forcing
from helpers.gpu_cases import (
    BACKENDS,
    MARGIN,
    TP2_DCP2,
    Case,
    assert_within_spread,
    fleet_fixture,
    measure,
    params,
)
from helpers.gpu_servers import Fleet, make_server
from helpers.nccl_ranks import needs_gpus

pytestmark = [pytest.mark.server, needs_gpus(2)]

# SGLang's function as it was before any hook, put back once all hooks are in place.
RESTORED = """
def restore():
    import sys
    from sglang.srt.models import utils
    from sglang.srt.plugins.hook_registry import HookRegistry

    fused, apply_hooks = utils.enable_fused_set_kv_buffer, HookRegistry.apply_hooks

    def apply_and_restore():
        apply_hooks()
        for name in ("sglang.srt.models.utils", "sglang.srt.models.qwen3_moe"):
            if name in sys.modules:
                sys.modules[name].enable_fused_set_kv_buffer = fused

    HookRegistry.apply_hooks = apply_and_restore


force_tokens = load


def load():
    force_tokens()
    restore()
"""
BLINDED = """
load_checked = load


def load():
    from sglang_dcp.hooks import verify

    verify.verify_hooks = lambda: None
    load_checked()
"""


def make_case(backend: str, label: str, more: str = "") -> Case:
    return Case(
        "qwen3-moe-d128",
        TP2_DCP2,
        f"{backend}-{label}",
        f"--attention-backend {backend} --page-size 1",
        plugin=teacher_forcing.PLUGIN + more,
    )


SEPARATE = [make_case(backend, "separate-write") for backend in BACKENDS]
FUSED = [make_case(backend, "fused-write", RESTORED + BLINDED) for backend in BACKENDS]


fleet = fleet_fixture(teacher_forcing.build_waves)


def test_refused_at_start(tmp_path: Path) -> None:
    unchecked = make_case(BACKENDS[0], "restored", RESTORED)
    with make_server(unchecked.spec, tmp_path) as server:
        code = server.wait_exit(120)
        line = server.log_tail(1)
    assert code == 2, line
    assert line.startswith("sglang-dcp: error: ") and "fused-kv-write" in line


@pytest.mark.parametrize("case", params(SEPARATE))
def test_separate_write_is_within_the_spread(case: Case, fleet: Fleet) -> None:
    assert_within_spread(case, fleet)


@pytest.mark.parametrize("case", params(FUSED))
def test_fused_write_shows(case: Case, fleet: Fleet) -> None:
    found, spread = measure(case, fleet)
    assert found.mean > MARGIN * spread.mean


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
