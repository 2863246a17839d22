"""What holds for which SGLang release, and what a release that is not known gets.

Only this file catches a row of a table that holds for no known release, and a flag of ours
that an unknown SGLang takes for its own.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp import releases
from sglang_dcp.config import DcpConfigError
from sglang_dcp.hooks import install, unknown_release
from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, RELIES_ON, rows_of
from sglang_dcp.releases import UnknownRelease, api, known_versions, load_release
from sglang_dcp.releases.installed import in_range, sglang_version

KNOWN = known_versions()
ROWS = (*HOOKS, *CPU_HOOKS, *RELIES_ON)


@pytest.mark.parametrize(
    ("release", "since", "until", "wanted"),
    [
        ("0.5.16", None, None, True),
        ("0.5.16", "0.5.16", None, True),
        ("0.5.16", None, "0.5.16", False),
        ("0.5.9", "0.5.16", None, False),
        ("0.5.23", "0.5.16", "0.5.23", False),
        ("0.10.0", "0.5.23", None, True),
        ("0.5.23.post1", None, "0.5.23", False),
        ("0.5.24rc0", "0.5.23", None, True),
    ],
)
def test_ranges(release: str, since: Any, until: Any, wanted: bool) -> None:
    assert in_range(release, since, until) == wanted


def test_the_installed_release_is_known() -> None:
    assert sglang_version() in KNOWN


@pytest.mark.parametrize("row", ROWS, ids=lambda row: getattr(row, "name", None))
def test_every_row_holds_for_a_known_release(row: Any) -> None:
    assert any(in_range(version, row.since, row.until) for version in KNOWN)


@pytest.mark.parametrize("version", KNOWN)
def test_the_hashes_of_a_release_cover_its_rows(version: str) -> None:
    files = load_release(version).files
    assert {row.path for row in rows_of(RELIES_ON, version)} <= set(files)
    names = [hook.name for hook in rows_of(HOOKS + CPU_HOOKS, version)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("version", "module"),
    [
        ("0.5.16", "v0_5_16"),
        ("0.5.17", "v0_5_16"),
        ("0.5.23", "v0_5_23"),
        ("0.6.0", "v0_5_23"),
    ],
)
def test_functions_of_a_release(
    version: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "sglang_version", lambda: version)
    api.sglang_api.cache_clear()
    try:
        found = type(api.sglang_api()).__module__
    finally:
        api.sglang_api.cache_clear()
    assert found == f"sglang_dcp.releases.{module}"


def test_no_kernel_reads_q_b_proj_past_its_quant_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang's own method: before our call it takes the kernel, after it the layer."""
    from sglang.srt.models import deepseek_v2

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it would read the sharded weight")

    monkeypatch.setattr(deepseek_v2, "linear_with_fused_a_gemm", kernel)
    monkeypatch.setattr(deepseek_v2, "fused_a_gemm_weight_eligible", lambda layer: True)
    attention = SimpleNamespace(
        use_min_latency_q_b_gemm=True,
        _use_min_latency_q_b_gemm=None,
        _q_b_proj_verified_shape=True,
        fused_a_gemm_backend="any",
        q_b_proj=lambda latent: (latent * 2, None),
        num_local_heads=2,
        qk_head_dim=3,
    )
    project = deepseek_v2.DeepseekV2AttentionMLA.q_b_proj_forward
    latent = torch.ones(4, 6)
    with pytest.raises(AssertionError, match="sharded weight"):
        project(attention, latent)
    attention._use_min_latency_q_b_gemm = None
    api.sglang_api().keep_quant_method_of_q_b(attention)
    assert torch.equal(project(attention, latent), (latent * 2).view(4, 2, 3))


def test_an_unknown_release_gets_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a newer one nor one between two known ones."""
    reasons: list[str] = []
    monkeypatch.setattr(install, "sglang_version", lambda: "0.5.20")
    monkeypatch.setattr(install, "active_hooks", lambda: 1 // 0)
    monkeypatch.setattr(unknown_release, "reject_flags", reasons.append)
    install.load()
    [reason] = reasons
    assert reason.startswith(
        "sglang 0.5.20 is not known to this sglang-dcp (known: 0.5"
    )
    assert f"install sglang=={KNOWN[-1]}, or run without DCP flags" in reason


REASON = "sglang 9 is not known"


@pytest.mark.parametrize(
    "words",
    [
        ["--dcp-size", "2"],
        ["--decode-context-parallel-size=2"],
        ["--attn-tp-size", "1"],
        ["--dcp-comm-backend", "a2a"],
        ["--no-dcp-replicate-q-proj"],
    ],
    ids=lambda words: words[0],
)
def test_our_flags_end_an_unknown_release(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        unknown_release.check_command_line(REASON, ["--tp", "2", *words])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"sglang-dcp: error: {words[0]}") and REASON in shown
    assert shown.count("\n") == 1 and "SGLANG_PLUGINS" in shown


def test_without_our_flags_an_unknown_release_starts() -> None:
    unknown_release.check_command_line(REASON, ["--tp", "2", "--dp-size", "1"])
    unknown_release.check_engine(REASON, object(), model_path="x", attn_tp_size=None)


def test_engine_on_an_unknown_release() -> None:
    with pytest.raises(DcpConfigError, match=f"dcp_size: {REASON}"):
        unknown_release.check_engine(REASON, object(), model_path="x", dcp_size=2)


def test_unknown_release_names_the_newest() -> None:
    with pytest.raises(UnknownRelease, match=f"install sglang=={KNOWN[-1]}"):
        releases.load_release("9.9.9")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
