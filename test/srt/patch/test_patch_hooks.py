"""A patched SGLang: every hook in its source, with the plugin switched off or idle.

Only here is it seen that the patched form is whole: hooks, fields, refusals and the
fixes, in processes that import a patched copy.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

from helpers import patch_trees
from helpers.gloo_ranks import SCRIPT_TIMEOUT_S, Finished, python_path, run_python
from sglang_dcp.hooks import inline
from sglang_dcp.hooks.table import CPU_HOOKS, active_hooks
from sglang_dcp.patch import cli

OFF = {"SGLANG_PLUGINS": "none"}
INTERPRETED = {**OFF, "TRITON_INTERPRET": "1"}
Scripts = dict[str, Future[Finished]]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with a patched SGLang."""
    package = patch_trees.linked_copy(tmp_path_factory.mktemp("patched"))
    assert cli.main(["apply", "--target", str(package)]) == 0
    return package.parent


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an unpatched one."""
    return patch_trees.linked_copy(tmp_path_factory.mktemp("pristine")).parent


@pytest.fixture(scope="module")
def half(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one of the files patched."""
    package = patch_trees.linked_copy(tmp_path_factory.mktemp("half"))
    name = "srt/layers/linear.py"
    (package / name).write_bytes((tree / "sglang" / name).read_bytes())
    return package.parent


@pytest.fixture(scope="module")
def scripts(
    tree: Path, pristine: Path, half: Path, tiny_llama: str
) -> Iterator[Scripts]:
    """What each script left behind; two run at once, as each is one core's work."""
    status = ("-m", "sglang_dcp", "status")
    runs = {
        "status": (status, tree, OFF),
        "half-patched": (status, half, {}),
        "plugin-off": (("-c", IN_A_PATCHED_PROCESS, tiny_llama), tree, OFF),
        "plugin-on": (("-c", IN_A_PATCHED_PROCESS, tiny_llama), tree, {}),
        "merge-fixed": (("-c", MERGE_WITH_NAN), tree, INTERPRETED),
        "merge-unfixed": (("-c", MERGE_WITH_NAN), pristine, INTERPRETED),
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {
            name: pool.submit(
                run_python,
                *arguments,
                timeout_s=SCRIPT_TIMEOUT_S,
                PYTHONPATH=python_path(folder),
                **env,
            )
            for name, (arguments, folder, env) in runs.items()
        }
        pool.shutdown(cancel_futures=True)


def test_status_without_the_plugin(scripts: Scripts) -> None:
    done = scripts["status"].result()
    assert done.code == 0, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    listed = [line.split()[:2] for line in lines[1:-1]]
    assert listed == [["patched", hook.name] for hook in active_hooks()]
    assert lines[-1] == f"{len(listed)} hooks: {len(listed)} patched"


def test_half_patched_is_refused(scripts: Scripts) -> None:
    done = scripts["half-patched"].result()
    assert done.code == 1, done.stdout + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[-1].startswith(
        "SGLang is half patched; run python -m sglang_dcp patch"
    )
    patched_here = [line.split()[1] for line in lines if line.startswith("patched ")]
    assert patched_here == ["kv-heads-weights"]


IN_A_PATCHED_PROCESS = """
import dataclasses, json, pickle, sys
from types import SimpleNamespace as Namespace
from unittest import mock
import torch
from sglang_dcp.hooks.server_args import DcpConfigError
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from helpers.server_args import resolve_server_args
from sglang_dcp.releases.api import sglang_api
load_plugins()
hooks = [hook for hooks in HookRegistry._hooks.values() for _, hook, _ in hooks]
out = {"hooked": [h.__name__ for h in hooks if h.__module__.startswith("sglang_dcp")]}
import sglang
from sglang.srt import server_args as module
from sglang_dcp.hooks import verify
ServerArgs = module.ServerArgs
out["class"] = ServerArgs.__module__
out["engine"] = sglang.Engine.server_args_class is ServerArgs
def make(**flags):
    common = dict(model_path=sys.argv[1], device="cpu", random_seed=1, tp_size=2)
    args = resolve_server_args(ServerArgs(**common, **flags))
    return args, sglang_api().resolved(args)
off, seen = make()
out["off"] = [off.dcp, seen.dcp_size, off.attn_tp_size, seen.page_size]
on, seen = make(attn_tp_size=1, dcp_comm_backend="a2a", page_size=2)
out["on"] = [on.dcp.dcp_size, on.dcp.comm_backend, seen.page_size]
of_a_record = hasattr(on, "resolved_dict")
shown = on.resolved_dict() if of_a_record else dataclasses.asdict(on)
out["shown"] = [shown["dcp_size"], shown["attn_tp_size"], shown["dcp_comm_backend"]]
try:
    make(attn_tp_size=1, dcp_size=1)
except DcpConfigError as error:
    out["refused"] = str(error)
before = verify.hooks_required()
pickle.loads(pickle.dumps(off))
out["required"] = [before, verify.hooks_required()]
same = pickle.loads(pickle.dumps(on))
out["required"].append(verify.hooks_required())
out["pickled"] = type(same) is ServerArgs and same.dcp == on.dcp

from sglang.srt import runtime_context
from sglang.srt.models import utils
utils._is_cuda = True
utils.get_token_to_kv_pool = lambda: Namespace(dtype=torch.bfloat16)
# A release reads some of these names, and an unused one does no harm.
utils.is_prefill_context_parallel_enabled = lambda: False
utils.is_cp_active = lambda batch: False
out["fused"] = []
for size in (1, 2):
    utils.get_server_args = lambda: Namespace(dcp_size=size)
    parallel = Namespace(dcp_enabled=size > 1)
    with mock.patch.object(runtime_context, "get_parallel", lambda: parallel):
        found = utils.enable_fused_set_kv_buffer(Namespace(dcp_kv_mask=None))
    out["fused"].append(found)

parser = __import__("argparse").ArgumentParser()
ServerArgs.add_cli_args(parser)
out["flags"] = [a.option_strings for a in parser._actions if a.dest == "dcp_size"]
flags = ["--model-path", sys.argv[1], "--device", "cpu", "--tp", "2"]
more = ["--decode-context-parallel-size", "3"]
print(json.dumps(out))
sys.stdout.flush()
resolve_server_args(ServerArgs.from_cli_args(parser.parse_args(flags + more)))
"""


@pytest.mark.parametrize("run", ["plugin-off", "plugin-on"])
def test_patched_process(run: str, scripts: Scripts) -> None:
    """The plugin, where it loads, finds nothing to hook."""
    done = scripts[run].result()
    assert done.stdout, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert out.pop("refused").startswith("--attn-tp-size 1 and --dcp-size 1 disagree")
    assert out == {
        "hooked": [],
        "class": "sglang.srt.server_args",
        "engine": True,
        "off": [None, 1, None, 1],
        "on": [2, "a2a", 4],
        "shown": [2, 1, "a2a"],
        "required": [False, False, True],
        "pickled": True,
        "fused": [True, False],
        "flags": [["--dcp-size", "--decode-context-parallel-size"]],
    }
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith("sglang-dcp: error: --dcp-size 3 ")


MERGE_WITH_NAN = """
import json, sys, types
import torch
import sglang.kernels.ops.attention.dcp_kernels as kernels
lse = torch.tensor([[[1.0, 2.0]], [[-float("inf"), 3.0]]])
own = torch.full((1, 2, 16), float("nan"))
own[0, 1] = 1.0
new = torch.empty(2, 1, 16)
out, merged = kernels.correct_attn_out(own, lse, 1, None, new)
print(json.dumps(out[:, 0, 0].tolist()))
combine = getattr(kernels, "dcp_lse_combine_triton", None)
if combine:
    others = torch.ones(1, 2, 16)
    both, _ = combine(torch.stack([others, own]), lse, is_lse_base_on_e=False)
    print(json.dumps(both[0, :, 0].tolist()))
"""


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "unfixed"])
def test_mla_merge_with_an_empty_rank(fixed: bool, scripts: Scripts) -> None:
    """SGLang's Triton kernels in the interpreter; unfixed they show the defect.

    A second one, which combines after an all-to-all, is not in every release.
    """
    done = scripts["merge-fixed" if fixed else "merge-unfixed"].result()
    assert done.stdout, done.stderr[-3000:]
    (empty, whole), *combined = map(json.loads, done.stdout.splitlines())
    assert whole == pytest.approx(2 / 3)
    assert (empty == 0.0) == fixed
    for empty, whole in combined:
        assert whole == pytest.approx(1.0)
        assert (empty == 1.0) == fixed


WITHOUT_SGLANG = """
import sys
from sglang_dcp.hooks import inline
from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, Kind
for hook in HOOKS + CPU_HOOKS:
    if hook.kind is not Kind.REPLACE and "dcp_server_args" not in hook.ours:
        hook.load()
sys.exit(", ".join(name for name in sys.modules if name.split(".")[0] == "sglang"))
"""


def test_our_hooks_do_not_import_sglang() -> None:
    """SGLang's modules import them while they are half imported themselves."""
    done = run_python("-c", WITHOUT_SGLANG)
    assert (done.code, done.stderr) == (1, "\n"), done.stderr[-3000:]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "_INSTALLED", {})


def test_a_hook_is_traced_by_torch_compile(table: None) -> None:
    """Off, and without a graph break: a model's forward may be compiled whole."""
    import torch

    @inline.hook("fused-kv-write")
    def enable(batch: Any) -> bool:
        return True

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if enable(None) else x

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 1


def test_cpu_hooks_leave_a_machine_with_an_accelerator_alone(
    table: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inline, "_sees_accelerator", lambda: True)
    for hook in CPU_HOOKS:
        original = object()
        assert inline.hook(hook.name)(original) is original


def test_unknown_name(table: None) -> None:
    with pytest.raises(ImportError, match="patched by another sglang-dcp"):
        inline.hook("of-another-version")
    assert inline._INSTALLED == {}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
