"""What holds for which SGLang release, and what a release that is not known gets.

Only this file catches a row of a table that holds for no known release, and a flag of ours
that an unknown SGLang takes for its own.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp import releases
from sglang_dcp.config import DcpConfigError
from sglang_dcp.hooks import commands, install, unknown_release
from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, RELIES_ON, rows_of
from sglang_dcp.releases import (
    UnknownRelease,
    api,
    installed,
    known_versions,
    load_release,
)
from sglang_dcp.releases.installed import NO_VERSION, in_range, sglang_version

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


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("0.5.15", False),
        ("0.5.16", True),
        ("0.5.16.post1", True),
        ("0.5.17", False),
        ("0.5.22", False),
        ("0.5.23", True),
        ("0.5.23+fork", True),
        ("0.5.24", False),
        (NO_VERSION, False),
    ],
)
def test_only_releases_with_functions_can_be_recorded(
    version: str,
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: list[str] = []

    def write(release: Any) -> Path:
        written.append(release.version)
        return Path(f"{release.version}.json")

    monkeypatch.setattr(commands, "sglang_version", lambda: version)
    monkeypatch.setattr(releases, "write_release", write)
    assert commands.record() == (0 if served else 1)
    assert written == ([version] if served else [])
    if not served:
        line = capsys.readouterr().out
        assert version in line and "Move to a new SGLang release" in line


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("_version.py", "__version__ = version = '0.5.23'\n", "0.5.23"),
        ("version.py", '__version__ = "0.5.9"\n', "0.5.9"),
        ("version.py", 'try:\n    __version__ = get("sglang")\n', NO_VERSION),
        ("other.py", "", NO_VERSION),
    ],
)
def test_version_of_a_source_tree(
    name: str, text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang without metadata; its code would end the test, so nothing may import it."""
    folder = tmp_path / "sglang"
    folder.mkdir()
    (folder / "__init__.py").write_text("1 / 0\n")
    (folder / name).write_text(text)
    spec = importlib.util.spec_from_file_location(
        "sglang", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )

    def no_metadata(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", no_metadata)
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: spec)
    assert installed.sglang_version.__wrapped__() == wanted


def test_no_version_is_an_unknown_release(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(install, "sglang_version", lambda: NO_VERSION)
    monkeypatch.setattr(unknown_release, "reject_flags", reasons.append)
    install.load()
    assert reasons[0].startswith("sglang (no version) is not known")


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


@pytest.mark.parametrize(
    "word",
    ["--dcp-si", "--dcp-comm=a2a", "--no-dcp-rep", "--attn-tp-s", "--decode-con"],
)
def test_shortened_flags_end_an_unknown_release(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        unknown_release.check_command_line(REASON, ["--tp", "2", word, "2"])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"sglang-dcp: error: {word}: {REASON}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("key", ["dcp-size", "dcp_size", "attn-tp-size", "dcp-comm-b"])
def test_flags_in_a_config_file_end_an_unknown_release(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(f"tp-size: 2\n{key}: 2\n")
    with pytest.raises(SystemExit) as caught:
        unknown_release.check_command_line(REASON, ["--config", str(config)])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"sglang-dcp: error: --{key.replace('_', '-')}: {REASON}")
    assert shown.count("\n") == 1


def test_without_our_flags_an_unknown_release_starts(tmp_path: Path) -> None:
    """Nor does a value, a flag that SGLang alone has, or a file that SGLang refuses."""
    unknown_release.check_command_line(REASON, ["--tp", "2", "--dp-size", "1"])
    unknown_release.check_command_line(REASON, ["--d", "2", "--attention-b", "triton"])
    for name, text in {"fine": "tp-size: 2", "list": "- dcp-size", "bad": "{"}.items():
        config = tmp_path / f"{name}.yaml"
        config.write_text(text)
        unknown_release.check_command_line(REASON, ["--config", str(config)])
    unknown_release.check_command_line(REASON, ["--config", str(tmp_path / "none")])
    unknown_release.check_command_line(REASON, ["--config"])
    unknown_release.check_engine(REASON, object(), model_path="x", attn_tp_size=None)


def test_engine_on_an_unknown_release() -> None:
    with pytest.raises(DcpConfigError, match=f"dcp_size: {REASON}"):
        unknown_release.check_engine(REASON, object(), model_path="x", dcp_size=2)


def test_unknown_release_names_the_newest() -> None:
    with pytest.raises(UnknownRelease, match=f"install sglang=={KNOWN[-1]}"):
        releases.load_release("9.9.9")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
