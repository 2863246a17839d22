"""The hook table against the installed SGLang, and every way in which it can be wrong.

Only this file catches a hook that a DCP server would run without: not hooked, gone, or
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

from helpers.gloo_ranks import run_python
from helpers.server_args import configure_scheduler
from sglang_dcp import plugin
from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.context import find_context, get_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import install, verify
from sglang_dcp.hooks.table import (
    CPU_HOOKS,
    HOOKS,
    Hook,
    Kind,
    active_hooks,
    relied_files,
    rows_of,
)
from sglang_dcp.releases import load_release
from sglang_dcp.releases.installed import sglang_version

EVERY = rows_of(HOOKS + CPU_HOOKS)
ASSIGNED = (Kind.ATTRIBUTE, Kind.ENTRY)
OURS = "sglang_dcp.hooks.scheduler:destroy_model_parallel"
each_hook = pytest.mark.parametrize("hook", EVERY, ids=lambda hook: hook.name)

pytestmark = pytest.mark.usefixtures("plugins")


def named(name: str) -> Hook:
    return next(hook for hook in EVERY if hook.name == name)


def absent(target: str, kind: Kind = Kind.AROUND) -> Hook:
    return Hook("absent-hook", target, kind, OURS, "a test")


def test_table_has_unique_names_and_targets() -> None:
    for field in ("name", "target"):
        values = [getattr(hook, field) for hook in EVERY]
        assert len(set(values)) == len(values)
    assert all(hook.why for hook in EVERY)


@each_hook
def test_ours_resolves_and_target_exists(hook: Hook) -> None:
    assert hook.load() is not None
    path, _, key = hook.target.rstrip("]").partition("[")
    found = pkgutil.resolve_name(path)
    assert not key or key in found
    assert path.startswith(hook.module + ".")


@each_hook
def test_every_hook_is_live_here(hook: Hook) -> None:
    [state] = verify.hook_states([hook])
    wanted = "hooked" if hook in active_hooks() else "not hooked"
    assert state == verify.HookState(hook, wanted, state.file)


@pytest.mark.parametrize("name", relied_files())
def test_drifted_reliance_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a hook, whose contents our kernels or views repeat."""
    original, drifted = verify.file_hash, verify.package_root() / name
    monkeypatch.setattr(
        verify, "file_hash", lambda p: "x" if p == drifted else original(p)
    )
    with pytest.raises(DcpConfigError, match=f"{name} is not the file of sglang"):
        verify.verify_hooks()


def test_overwritten_hook_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered and applied, and then replaced by somebody's assignment."""
    from sglang.srt.models import utils

    hook = named("fused-kv-write")
    assert verify.is_live(hook)
    monkeypatch.setattr(utils, "enable_fused_set_kv_buffer", lambda batch: True)
    assert not verify.is_live(hook)


def test_verified_here() -> None:
    verify.verify_hooks()
    verify.exit_unless_verified()


def test_release_is_the_installed_source() -> None:
    release = load_release(sglang_version())
    root = verify.package_root()
    files = {verify.target_file(hook) for hook in EVERY}
    files |= {root / name for name in (*relied_files(), *release.touched())}
    known = {name: hashes.original for name, hashes in release.files.items()}
    assert known == {
        path.relative_to(root).as_posix(): verify.file_hash(path) for path in files
    }


@pytest.mark.parametrize(
    "file", ["srt/layers/linear.py", "srt/models/llama.py"], ids=["hook", "relied-on"]
)
def test_drift_that_the_user_accepts(
    file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The named file alone, and with a line in the log."""
    original, drifted = verify.file_hash, verify.package_root() / file
    monkeypatch.setattr(
        verify, "file_hash", lambda p: "x" if p == drifted else original(p)
    )
    with pytest.raises(DcpConfigError) as caught:
        verify.verify_hooks()
    hint = str(caught.value).rpartition("; ")[2].rpartition(", set ")[2]
    assert hint == f"{verify.ALLOW_DRIFT}={file}"
    monkeypatch.setenv(verify.ALLOW_DRIFT, "srt/models/qwen2.py")
    with pytest.raises(DcpConfigError, match=f"{file} is not the file"):
        verify.verify_hooks()
    verify._warn_of_drift.cache_clear()
    monkeypatch.setenv(verify.ALLOW_DRIFT, f"srt/models/qwen2.py,{file}")
    with caplog.at_level("WARNING"):
        verify.verify_hooks()
    [record] = caplog.records
    assert record.getMessage().startswith(f"DCP: {file} is not the file of sglang")


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
    [state] = verify.hook_states([named(name)])
    assert (state.state, state.file) == ("drifted", file)
    with pytest.raises(DcpConfigError) as caught:
        verify.verify_hooks()
    message = str(caught.value)
    for part in (
        f"{file} is not the file of sglang {sglang_version()}",
        f"hook {name}",
        "Reinstall",
    ):
        assert part in message
    sharing = [s for s in active_hooks() if verify.target_file(s) == drifted]
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
    monkeypatch.setattr(verify, "active_hooks", lambda: (*EVERY, absent(target)))
    [state] = verify.hook_states([absent(target)])
    assert state.state == "missing"
    with pytest.raises(DcpConfigError, match=rf"{target} does not exist \(hook absent"):
        verify.verify_hooks()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param(Kind.AROUND, "does not exist", id="around"),
        # An assignment may be what brings the name into being.
        pytest.param(Kind.ATTRIBUTE, "is not hooked", id="attribute"),
    ],
)
def test_missing_name_in_a_known_file_is_named(kind: Kind, fault: str) -> None:
    hook = absent("sglang.srt.server_args.NoSuchName", kind)
    [line] = verify.problems(verify.hook_states([hook]))
    assert f"NoSuchName {fault} (hook absent-hook)" in line


@pytest.mark.parametrize("name", ["groups-init", "server-args"])
def test_unhooked_hook_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    target = named(name).target
    monkeypatch.setattr(HookRegistry, "_patched", HookRegistry._patched - {target})
    with pytest.raises(
        DcpConfigError, match=f"{target} is not hooked .*SGLANG_PLUGINS"
    ):
        verify.verify_hooks()


def test_hook_of_another_plugin_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = named("groups-init").target
    other = {**HookRegistry._hooks, target: [(HookType.AFTER, print, None)]}
    monkeypatch.setattr(HookRegistry, "_hooks", other)
    assert not verify.is_live(named("groups-init"))


@pytest.mark.parametrize(
    "name", [hook.name for hook in EVERY if hook.kind in ASSIGNED and hook in HOOKS]
)
def test_hook_assigned_over_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = named(name)
    path, _, key = hook.target.rstrip("]").partition("[")
    if key:
        monkeypatch.setitem(pkgutil.resolve_name(path), key, object())
    else:
        monkeypatch.setattr(path, object())
    with pytest.raises(DcpConfigError, match=f"hook {name}"):
        verify.verify_hooks()


def test_unknown_sglang_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sglang_version", lambda: "9.9.9")
    with pytest.raises(DcpConfigError, match="9.9.9 is not known .*sglang==0.5.23"):
        verify.verify_hooks()


def test_scheduler_exits_with_one_line(
    server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = server_args(tp_size=4, dcp_size=2)
    monkeypatch.setattr(verify, "sglang_version", lambda: "9.9.9")
    configure_scheduler(server_args(), 0)
    with pytest.raises(SystemExit) as caught:
        configure_scheduler(args, 3)
    message = str(caught.value.code)
    assert message.startswith("sglang-dcp: error: sglang 9.9.9")
    assert "\n" not in message and find_context() is None


def test_scheduler_learns_its_place(server_args: Any) -> None:
    configure_scheduler(server_args(tp_size=4, dcp_size=2), 3)
    context = get_context()
    assert context.config == DcpConfig(Layout(4, 2))
    assert (context.tp_rank, context.attn_tp_rank, context.dcp_rank) == (3, 1, 1)


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
    monkeypatch.setattr(install, "active_hooks", lambda: (absent(target, kind),))
    monkeypatch.setattr(verify, "_required", False)
    plugin.load()
    verify.require_hooks()
    with pytest.raises(SystemExit) as caught:
        plugin.load()
    assert str(caught.value.code).startswith("sglang-dcp: error: hook absent-hook: ")


def test_bug_in_our_own_module_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook = absent("sglang.srt.server_args.NAME", Kind.ATTRIBUTE)
    monkeypatch.setattr(install, "active_hooks", lambda: (hook,))
    monkeypatch.setattr(Hook, "load", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        plugin.load()


def test_status_lists_all_hooks() -> None:
    done = run_python("-m", "sglang_dcp", "status")
    assert done.code == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"sglang {sglang_version()}"
    listed = [line.split() for line in lines if line.startswith("hooked ")]
    assert listed == [["hooked", hook.name, hook.target] for hook in active_hooks()]
    assert lines[-1] == f"{len(listed)} hooks: {len(listed)} hooked"


WITHOUT_PLUGIN = """
import json
from sglang_dcp.hooks import verify
from sglang_dcp.config import DcpConfigError
from sglang_dcp.hooks.table import active_hooks
states = {s.hook.name: s.state for s in verify.hook_states(active_hooks())}
try:
    verify.verify_hooks()
except DcpConfigError as error:
    print(json.dumps([states, str(error)]))
verify.exit_unless_verified()
"""


def test_without_plugin_nothing_is_live() -> None:
    done = run_python("-c", WITHOUT_PLUGIN)
    assert done.stdout, done.stderr[-3000:]
    states, message = json.loads(done.stdout)
    assert states == {hook.name: "not hooked" for hook in active_hooks()}
    assert all(f"(hook {hook.name})" in message for hook in active_hooks())
    assert done.code == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"sglang-dcp: error: {message}"


def test_package_is_found_by_entry_point() -> None:
    from importlib.metadata import entry_points

    [entry] = entry_points(group="sglang.srt.plugins", name="sglang_dcp")
    assert entry.load() is importlib.import_module("sglang_dcp.plugin").load


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
