"""The seam table against the installed SGLang, and every way in which it can be wrong.

Only this file catches a seam that a DCP server would run without: not hooked, gone, or
on source that we do not know. Without the plugin (a process of its own) nothing is live.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_dcp import plugin, process, verify
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.context import find_context, get_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.seams import CPU_SEAMS, RELIES_ON, SEAMS, Kind, Seam, active_seams
from utils import run_python

EVERY = SEAMS + CPU_SEAMS
ASSIGNED = (Kind.ATTRIBUTE, Kind.ENTRY)
OURS = "sglang_dcp.process:destroy_model_parallel"
each_seam = pytest.mark.parametrize("seam", EVERY, ids=lambda seam: seam.name)

pytestmark = pytest.mark.usefixtures("plugins")


def named(name: str) -> Seam:
    return next(seam for seam in EVERY if seam.name == name)


def absent(target: str, kind: Kind = Kind.AROUND) -> Seam:
    return Seam("absent-seam", target, kind, OURS, "a test")


def test_table_has_unique_names_and_targets() -> None:
    for field in ("name", "target"):
        values = [getattr(seam, field) for seam in EVERY]
        assert len(set(values)) == len(values)
    assert all(seam.why for seam in EVERY)


@each_seam
def test_ours_resolves_and_target_exists(seam: Seam) -> None:
    assert seam.load() is not None
    path, _, key = seam.target.rstrip("]").partition("[")
    found = pkgutil.resolve_name(path)
    assert not key or key in found
    assert path.startswith(seam.module + ".")


@each_seam
def test_every_seam_is_live_here(seam: Seam) -> None:
    [state] = verify.seam_states([seam])
    wanted = "hooked" if seam in active_seams() else "not hooked"
    assert state == verify.SeamState(seam, wanted, state.file)


@pytest.mark.parametrize("name", RELIES_ON)
def test_drifted_reliance_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a seam, whose contents our kernels or views repeat."""
    original, drifted = verify.file_hash, verify.package_root() / name
    monkeypatch.setattr(
        verify, "file_hash", lambda p: "x" if p == drifted else original(p)
    )
    with pytest.raises(DcpConfigError, match=f"{name} is not the file of sglang"):
        verify.verify_seams()


def test_overwritten_hook_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered and applied, and then replaced by somebody's assignment."""
    from sglang.srt.models import utils

    seam = named("fused-kv-write")
    assert verify.is_live(seam)
    monkeypatch.setattr(utils, "enable_fused_set_kv_buffer", lambda batch: True)
    assert not verify.is_live(seam)


def test_verified_here() -> None:
    verify.verify_seams()
    verify.exit_unless_verified()


def test_manifest_is_the_installed_source() -> None:
    manifest = verify.load_manifest(verify.sglang_version())
    root = verify.package_root()
    files = {verify.seam_file(seam) for seam in EVERY}
    files |= {root / name for name in RELIES_ON}
    assert manifest == {
        path.relative_to(root).as_posix(): verify.file_hash(path) for path in files
    }


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param("kv-heads-weights", "srt/layers/linear.py", id="hook"),
        pytest.param(
            "attention-torch-native",
            "srt/layers/attention/attention_registry.py",
            id="entry",
        ),
        pytest.param("engine-server-args", "srt/entrypoints/engine.py", id="attribute"),
    ],
)
def test_drifted_file_is_named(
    name: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte more in one file of SGLang, as the hash sees it."""
    original = verify.file_hash
    drifted = verify.package_root() / file
    monkeypatch.setattr(
        verify,
        "file_hash",
        lambda p: original(p)[::-1] if p == drifted else original(p),
    )
    [state] = verify.seam_states([named(name)])
    assert (state.state, state.file) == ("drifted", file)
    with pytest.raises(DcpConfigError) as caught:
        verify.verify_seams()
    message = str(caught.value)
    for part in (
        f"{file} is not the file of sglang 0.5.16",
        f"seam {name}",
        "Reinstall",
    ):
        assert part in message
    sharing = [s for s in active_seams() if verify.seam_file(s) == drifted]
    assert message.count("is not the file") == len(sharing)


def test_file_hash_sees_one_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x = 1\n")
    (tmp_path / "b").write_bytes(b"x = 1 \n")
    hashes = [verify.file_hash(tmp_path / name) for name in "ab"]
    assert hashes[0] != hashes[1] and len(hashes[0]) == 64


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("sglang.srt.no_such_module.function", id="module"),
        pytest.param("sglang.srt.layers.no_such.Class.method", id="nested-module"),
        pytest.param("sglang.no_such_module.function", id="module-of-a-package"),
        pytest.param("no_such_package.function", id="package"),
    ],
)
def test_missing_target_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "active_seams", lambda: (*EVERY, absent(target)))
    [state] = verify.seam_states([absent(target)])
    assert state.state == "missing"
    with pytest.raises(DcpConfigError, match=rf"{target} does not exist \(seam absent"):
        verify.verify_seams()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param(Kind.AROUND, "does not exist", id="around"),
        # An assignment may be what brings the name into being.
        pytest.param(Kind.ATTRIBUTE, "is not hooked", id="attribute"),
    ],
)
def test_missing_name_in_a_known_file_is_named(kind: Kind, fault: str) -> None:
    seam = absent("sglang.srt.server_args.NoSuchName", kind)
    [line] = verify.problems(verify.seam_states([seam]))
    assert f"NoSuchName {fault} (seam absent-seam)" in line


@pytest.mark.parametrize("name", ["groups-init", "server-args"])
def test_unhooked_seam_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = named(name).target
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    with pytest.raises(
        DcpConfigError, match=f"{target} is not hooked .*SGLANG_PLUGINS"
    ):
        verify.verify_seams()


def test_hook_of_another_plugin_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = named("groups-init").target
    other = {**HookRegistry._hooks, target: [(HookType.AFTER, print, None)]}
    monkeypatch.setattr(HookRegistry, "_hooks", other)
    assert not verify.is_live(named("groups-init"))


@pytest.mark.parametrize(
    "name", [seam.name for seam in EVERY if seam.kind in ASSIGNED and seam in SEAMS]
)
def test_seam_assigned_over_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = named(name)
    path, _, key = seam.target.rstrip("]").partition("[")
    if key:
        monkeypatch.setitem(pkgutil.resolve_name(path), key, object())
    else:
        monkeypatch.setattr(path, object())
    with pytest.raises(DcpConfigError, match=f"seam {name}"):
        verify.verify_seams()


def test_unknown_sglang_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sglang_version", lambda: "9.9.9")
    with pytest.raises(DcpConfigError, match="9.9.9 is not known .*sglang==0.5.16"):
        verify.verify_seams()


def test_scheduler_exits_with_one_line(
    server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = server_args(tp_size=4, dcp_size=2)
    monkeypatch.setattr(verify, "sglang_version", lambda: "9.9.9")
    process.configure_scheduler_process(server_args(), 0, 3)
    with pytest.raises(SystemExit) as caught:
        process.configure_scheduler_process(args, 0, 3)
    message = str(caught.value.code)
    assert message.startswith("sglang-dcp: error: sglang 9.9.9")
    assert "\n" not in message and find_context() is None


def test_scheduler_learns_its_place(server_args: Any) -> None:
    process.configure_scheduler_process(server_args(tp_size=4, dcp_size=2), 0, 3)
    context = get_context()
    assert context.config == DcpConfig(Layout(4, 2))
    assert (context.tp_rank, context.attn_tp_rank, context.kvp_rank) == (3, 1, 1)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        pytest.param("sglang.srt.no_such.NAME", Kind.ATTRIBUTE, id="attribute"),
        pytest.param("sglang.srt.server_args.NO_SUCH[key]", Kind.ENTRY, id="entry"),
    ],
)
def test_plugin_without_a_target(
    target: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts without DCP; ends a scheduler process of a DCP server."""
    monkeypatch.setattr(plugin, "active_seams", lambda: (absent(target, kind),))
    monkeypatch.setattr(verify, "_required", False)
    plugin.load()
    verify.require_seams()
    with pytest.raises(SystemExit) as caught:
        plugin.load()
    assert str(caught.value.code).startswith("sglang-dcp: error: seam absent-seam: ")


def test_bug_in_our_own_module_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seam = absent("sglang.srt.server_args.NAME", Kind.ATTRIBUTE)
    monkeypatch.setattr(plugin, "active_seams", lambda: (seam,))
    monkeypatch.setattr(Seam, "load", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plugin.load()


def test_status_lists_all_seams() -> None:
    done = run_python("-m", "sglang_dcp", "status")
    assert done.code == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"sglang {verify.sglang_version()}"
    listed = [line.split() for line in lines if line.startswith("hooked ")]
    assert listed == [["hooked", seam.name, seam.target] for seam in active_seams()]
    assert lines[-1] == f"{len(listed)} seams: {len(listed)} hooked"


WITHOUT_PLUGIN = """
import json
from sglang_dcp import verify
from sglang_dcp.config import DcpConfigError
from sglang_dcp.seams import active_seams
states = {s.seam.name: s.state for s in verify.seam_states(active_seams())}
try:
    verify.verify_seams()
except DcpConfigError as error:
    print(json.dumps([states, str(error)]))
verify.exit_unless_verified()
"""


def test_without_plugin_nothing_is_live() -> None:
    done = run_python("-c", WITHOUT_PLUGIN)
    assert done.stdout, done.stderr[-3000:]
    states, message = json.loads(done.stdout)
    assert states == {seam.name: "not hooked" for seam in active_seams()}
    assert all(f"(seam {seam.name})" in message for seam in active_seams())
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"sglang-dcp: error: {message}"


def test_package_is_found_by_entry_point() -> None:
    from importlib.metadata import entry_points

    [entry] = entry_points(group="sglang.srt.plugins", name="sglang_dcp")
    assert entry.load() is importlib.import_module("sglang_dcp.plugin").load


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
