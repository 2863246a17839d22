"""The stand-in for FlashMLA on GPU machines: SGLang imports it, nobody computes with it.

Only here is it seen that a real module wins, and that a call of the stand-in is an error.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_dcp.releases.installed import in_range, sglang_version

ROOT = Path(__file__).parents[3]
STAND_INS = ROOT / "benchmark/stand_ins"
# Loads SGLang's own module alone, since its package imports for long.
IMPORTED = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("interface", sys.argv[1])
interface = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interface)
import flash_mla
assert "stand_ins" in flash_mla.__file__
assert not isinstance(torch.zeros(1), interface.FlashMLASchedMeta)
calls = {
    "metadata": lambda: interface.get_mla_metadata(),
    "sparse": lambda: interface.flash_mla_sparse_fwd(None, None, None, 1.0),
    "class": lambda: interface.FlashMLASchedMeta(),
    "mega": lambda: flash_mla.fused_norm_rope_attn_rope_cast.prefill(),
}
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        assert "FlashMLA is not installed" in str(error), name
    else:
        raise AssertionError(name)
"""


@pytest.mark.skipif(
    not in_range(sglang_version(), "0.5.23", None),
    reason="an older SGLang brings FlashMLA along",
)
def test_sglang_imports_it_and_cannot_call_it() -> None:
    found = importlib.util.find_spec("sglang")
    assert found is not None and found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    interface = package / "kernels/ops/attention/flash_mla_interface.py"
    subprocess.run(
        [sys.executable, "-c", IMPORTED, interface],
        env={**os.environ, "PYTHONPATH": str(STAND_INS)},
        check=True,
    )


def path_of(site: Path, release: str) -> list[str]:
    """PYTHONPATH of a GPU machine whose Python has no FlashMLA of its own."""
    python = site.parent / "bin/python3"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    env = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(site),
        "SITE": str(site),
        "RELEASE": release,
    }
    script = "source benchmark/gpu_environment.sh; echo $PYTHONPATH"
    command = ["bash", "-uc", script]
    return subprocess.check_output(command, cwd=ROOT, env=env, text=True).split(":")


def test_it_is_the_last_where_there_is_none(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    assert path_of(site, "0.5.23")[-1].strip() == str(STAND_INS)
    # The stack's own release needs none.
    assert str(STAND_INS) not in "".join(path_of(site, ""))


def test_a_real_module_keeps_it_away(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "flash_mla").mkdir(parents=True)
    (site / "flash_mla/__init__.py").touch()
    assert str(STAND_INS) not in "".join(path_of(site, "0.5.23"))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
