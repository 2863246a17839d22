"""Which DCP servers keep SGLang's prefill graphs, and what they meet in one.

Only this file catches a server that keeps a graph which was never compared, memory that is
set aside for a graph that goes, and an attribute of the attention backend that SGLang's
prefill runner begins to read.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig

from helpers.doors import with_door
from helpers.gloo_ranks import python_path, run_python
from helpers.gpu_servers import Run
from helpers.prefill_graph import HAS_PREFILL_GRAPHS
from sglang_dcp.config import DcpConfig, Replicas, resolve_config
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import server_args
from sglang_dcp.layers.attention import DcpAttentionBackend
from sglang_dcp.support import prefill_graphs
from sglang_dcp.support.prefill_graphs import (
    EAGER_PREFILL,
    keeps_prefill_graphs,
    needs_eager_prefill,
)

needs_prefill_graphs = pytest.mark.skipif(
    not HAS_PREFILL_GRAPHS, reason="this SGLang captures attention in prefill graphs"
)
NEW = "0.5.23"

FINE = dict(
    device="cuda",
    dcp=DcpConfig(Layout(4, 2)),
    attention_backend="fa3",
    prefill_attention_backend=None,
    cuda_graph_backend_prefill=None,
    cuda_graph_config=None,
    chunked_prefill_size=None,
    speculative_algorithm=None,
    enable_lora=None,
    lora_paths=None,
    enable_memory_saver=False,
    moe_a2a_backend="none",
    moe_dense_tp_size=None,
    enable_layernorm_sp=False,
    ep_size=1,
)


def fine(**changes: Any) -> Any:
    assert set(changes) <= set(FINE)
    return SimpleNamespace(**{**FINE, **changes})


def in_replicas() -> DcpConfig:
    config = resolve_config(
        tp_size=4,
        dcp_size=2,
        attn_tp_size=None,
        comm_backend="a2a",
        replicate_q_proj=False,
        default_comm_backend="a2a",
        replicas=Replicas(2, "--dp-size"),
    )
    assert config is not None
    return config


def graphs(prefill: str) -> CudaGraphConfig:
    return CudaGraphConfig.from_dict({"prefill": {"backend": prefill}})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("--cuda-graph-backend-prefill", {"cuda_graph_backend_prefill": "full"}),
    "json": (
        "--cuda-graph-backend-prefill",
        {
            "cuda_graph_backend_prefill": "breakable",
            "cuda_graph_config": {"prefill": {"backend": "full"}},
        },
    ),
    "resolved": (
        "--cuda-graph-backend-prefill",
        {"cuda_graph_config": graphs("full")},
    ),
    "backend": ("--attention-backend", {"attention_backend": "torch_native"}),
    "prefill-backend": (
        "--attention-backend",
        {"attention_backend": None, "prefill_attention_backend": "torch_native"},
    ),
    "whole-prompts": ("--chunked-prefill-size", {"chunked_prefill_size": -1}),
    "replicas": ("--attn-dp-size", {"dcp": in_replicas()}),
    "speculation": ("--speculative-algorithm", {"speculative_algorithm": "EAGLE"}),
    "lora": ("--enable-lora", {"enable_lora": True}),
    "adapters": ("--lora-paths", {"lora_paths": ["a=/a"]}),
    "memory-saver": ("--enable-memory-saver", {"enable_memory_saver": True}),
    "a2a": ("--moe-a2a-backend", {"moe_a2a_backend": "deepep"}),
    "dense-tp": ("--moe-dense-tp-size", {"moe_dense_tp_size": 1}),
    "layernorm": ("--enable-layernorm-sp", {"enable_layernorm_sp": True}),
    "experts": ("--ep-size", {"ep_size": 2}),
}
KEPT: dict[str, dict[str, Any]] = {
    "default": {},
    "unnamed-backend": {"attention_backend": None},
    "flashinfer": {"attention_backend": "flashinfer"},
    "triton": {"attention_backend": "triton"},
    "named-graph": {"cuda_graph_backend_prefill": "breakable"},
    "json-of-decode": {"cuda_graph_config": {"decode": {"max_bs": 8}}},
    "json-wins": {
        "cuda_graph_backend_prefill": "full",
        "cuda_graph_config": {"prefill": {"backend": "breakable"}},
    },
    "resolved": {"cuda_graph_config": graphs("breakable")},
    "chunks": {"chunked_prefill_size": 8192},
    "replicated-q": {"dcp": DcpConfig(Layout(4, 2), replicate_q_proj=True)},
}


@pytest.mark.parametrize("changes", KEPT.values(), ids=KEPT)
def test_kept(changes: dict[str, Any]) -> None:
    assert keeps_prefill_graphs(fine(**changes), NEW, on_gpu=True)


def test_eager_models_other_devices_and_the_older_release() -> None:
    assert not keeps_prefill_graphs(fine(), NEW, on_gpu=True, eager_model=True)
    assert not keeps_prefill_graphs(fine(), NEW, on_gpu=False)
    assert not keeps_prefill_graphs(fine(), "0.5.16", on_gpu=True)


@pytest.mark.parametrize(
    ("attention", "quantization", "replicated", "eager"),
    [
        ("MHA", None, True, False),
        ("MHA", "fp8", False, False),
        ("MHA", "fp8", True, True),
        ("MLA", None, False, True),
        ("MLA", "fp8", True, True),
    ],
)
def test_models_that_prefill_eagerly(
    attention: str, quantization: Any, replicated: bool, eager: bool
) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    model = SimpleNamespace(
        attention_arch=AttentionArch[attention],
        quantization=quantization,
        hf_config=SimpleNamespace(),
    )
    config = DcpConfig(Layout(4, 2), replicate_q_proj=replicated)
    assert needs_eager_prefill(model, config, fine()) == eager


@pytest.mark.parametrize(
    "named, quantization, eager",
    [
        ("fa3", None, False),
        (None, None, False),
        ("flashinfer", None, True),
        ("fa3", "fp8", True),
    ],
)
def test_latents_in_graphs_where_they_are_served(
    named: Any, quantization: Any, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    monkeypatch.setattr(prefill_graphs, "SERVED_LATENTS", frozenset({"fa3"}))
    model = SimpleNamespace(
        attention_arch=AttentionArch.MLA,
        quantization=quantization,
        hf_config=SimpleNamespace(),
    )
    args = fine(attention_backend=named)
    assert needs_eager_prefill(model, DcpConfig(Layout(4, 2)), args) == eager


@pytest.mark.parametrize("name", CASES)
def test_eager(name: str) -> None:
    flag, changes = CASES[name]
    args = fine(**changes)
    applied = [row for row in EAGER_PREFILL if row.value(args) is not None]
    assert [row.flag for row in applied] == [flag] and applied[0].reason
    assert not keeps_prefill_graphs(args, NEW, on_gpu=True)


def test_each_row_has_a_case() -> None:
    assert {flag for flag, _ in CASES.values()} == {row.flag for row in EAGER_PREFILL}


@needs_prefill_graphs
def test_rows_read_arguments_that_the_release_has() -> None:
    from sglang.srt.arg_groups.arg_utils import record_fields
    from sglang.srt.server_args import ServerArgs

    fields = {field.name for field in record_fields(ServerArgs)}
    assert set(FINE) - {"dcp"} <= fields


def test_the_plugin_of_a_server_opens_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "EAGER_PREFILL", EAGER_PREFILL)
    args = fine(ep_size=2)
    assert not keeps_prefill_graphs(args, NEW, on_gpu=True)
    plugin: dict[str, Any] = {}
    source = "def load():\n    loaded.append(1)\nloaded = []"
    exec(with_door(source, "prefill_graph_door"), plugin)
    plugin["load"]()
    assert plugin["loaded"] == [1] and keeps_prefill_graphs(args, NEW, on_gpu=True)
    assert not keeps_prefill_graphs(fine(enable_lora=True), NEW, on_gpu=True)


def test_prefill_batches_are_read_from_the_log() -> None:
    line = "Prefill batch, #new-seq: 1, #new-token: {}, #cached-token: {}, full token "
    line += "usage: 0.01, #running-req: 0, cuda graph: {}, input throughput: 9\n"
    log = line.format(1024, 0, True) + line.format(5, 1310, True)
    log += "Decode batch, #running-req: 7, cuda graph: True, gen throughput: 9\n"
    run = Run({}, {}, log + line.format(1, 0, False))
    assert run.prefill_batches(graph=True) == {(1024, 0), (5, 1310)}
    assert run.prefill_batches(graph=False) == {(1, 0)}


def test_the_log_has_these_words() -> None:
    srt = Path(sglang.__file__).parent / "srt/managers"
    source = "".join(path.read_text() for path in srt.rglob("*metrics*.py"))
    for words in ("Prefill batch", "#new-token: {", "#cached-token: {", "cuda graph"):
        assert words in source


class FakeApi:
    """SGLang's resolved arguments, and what was declared."""

    def __init__(self, args: Any, backend: str = "disabled") -> None:
        self._args, self.backend = args, backend

    def resolved(self, args: Any) -> Any:
        return self._args

    def declare(self, args: Any, source: str, **fields: Any) -> None:
        self._args.__dict__.update(fields)

    def has_prefill_graph(self, args: Any) -> bool:
        return self.backend != "disabled"

    def turn_off_prefill_graph(self, args: Any) -> bool:
        was_on, self.backend = self.has_prefill_graph(args), "disabled"
        return was_on


ONE_OFF = "DCP: prefill CUDA graph turned off"
ALL_OFF = "DCP: prefill CUDA graphs turned off"
STAY = "DCP: prefill CUDA graphs kept, attention runs between segments"


def settle(
    monkeypatch: pytest.MonkeyPatch, args: Any, backend: str, *, eager_model: bool
) -> str:
    api = FakeApi(args, backend)
    monkeypatch.setattr(server_args, "sglang_api", lambda: api)
    monkeypatch.setattr(server_args, "sglang_version", lambda: NEW)
    server_args._settle_prefill_graphs(args, args, eager_model=eager_model)
    return api.backend


@pytest.mark.parametrize(
    ("args", "backend", "eager_model", "said"),
    [
        pytest.param(fine(), "breakable", False, STAY, id="kept"),
        pytest.param(fine(), "disabled", False, None, id="off-by-sglang"),
        pytest.param(fine(), "breakable", True, ONE_OFF, id="model"),
        pytest.param(
            fine(cuda_graph_config=graphs("full")), "full", False, ONE_OFF, id="full"
        ),
        pytest.param(
            fine(attention_backend="torch_native"),
            "breakable",
            False,
            ONE_OFF,
            id="backend",
        ),
        pytest.param(fine(device="cpu"), "breakable", False, ONE_OFF, id="cpu"),
    ],
)
def test_what_is_left_is_kept_or_turned_off(
    args: Any,
    backend: str,
    eager_model: bool,
    said: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    left = settle(monkeypatch, args, backend, eager_model=eager_model)
    assert left == ("disabled" if said == ONE_OFF else backend)
    assert caplog.messages == ([said] if said else [])


@pytest.mark.parametrize(
    ("changes", "disabled"),
    [
        ({}, False),
        ({"attention_backend": None}, False),
        ({"attention_backend": "torch_native"}, True),
        ({"enable_lora": True}, True),
        ({"cuda_graph_backend_prefill": "full"}, True),
        # A CPU has none, and nothing is said.
        ({"device": "cpu"}, False),
    ],
)
def test_prepare_keeps_what_may_stay(
    changes: dict[str, Any],
    disabled: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sglang_dcp.hooks import verify
    from sglang_dcp.support import server

    monkeypatch.setattr(verify, "verify_hooks", lambda: None)
    monkeypatch.setattr(server, "check_server_args", lambda args: None)
    monkeypatch.setattr(server_args, "sglang_version", lambda: NEW)
    args = fine(**changes)
    args.decode_attention_backend, args.disable_prefill_cuda_graph = None, False
    caplog.set_level(logging.INFO)
    server_args.prepare(args)
    assert args.disable_prefill_cuda_graph == disabled
    assert caplog.messages == [ALL_OFF] * disabled


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [("cuda", False, True), ("cuda", True, True), ("cpu", False, False)],
)
def test_graphs_go_before_memory_is_set_aside(
    device: str,
    before: bool,
    after: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = fine(device=device)
    args.disable_prefill_cuda_graph = before
    monkeypatch.setattr(server_args, "sglang_api", lambda: FakeApi(args))
    caplog.set_level(logging.INFO)
    server_args.drop_prefill_graphs(args)
    assert args.disable_prefill_cuda_graph == after
    assert caplog.messages == [ALL_OFF] * (after and not before)


def test_the_hook_of_the_model_config_tells_the_kind_of_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_dcp.hooks.model_config import model_config_from_server_args
    from sglang_dcp.layers import heads
    from sglang_dcp.support import models

    monkeypatch.setattr(models, "check_model", lambda model, config: None)
    monkeypatch.setattr(heads, "is_scaled", lambda model: False)
    monkeypatch.setattr(heads, "scale_kv_heads", lambda model, config: None)
    monkeypatch.setattr(
        prefill_graphs, "needs_eager_prefill", lambda model, *_: model == "latents"
    )
    for model in ("heads", "latents"):
        args = fine()
        args.disable_prefill_cuda_graph = False
        api = FakeApi(args)
        monkeypatch.setattr(server_args, "sglang_api", lambda api=api: api)
        assert model_config_from_server_args(lambda args: model, args) == model
        assert args.disable_prefill_cuda_graph == (model == "latents")


RESOLVE = """
import json, sys
from pathlib import Path

from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.arg_groups import memory_hook
from sglang.srt.model_executor import cuda_graph_config
from sglang.srt.server_args import ServerArgs

from sglang_dcp.demo.tiny_model import make_tiny_model
from sglang_dcp.releases.api import sglang_api

# As on a machine with GPUs of 140 GB.
memory_hook.get_device_memory_capacity = lambda device: 140 << 10
cuda_graph_config.default_prefill_backend = lambda: "breakable"
for kind in ("qwen3-moe-d128", "mla-moe-d512"):
    model = make_tiny_model(Path(sys.argv[1]) / kind, kind)
    args = ServerArgs(
        model_path=str(model), tp_size=2, dcp_size=2, device="cuda", dtype="bfloat16",
        attention_backend="flashinfer", skip_tokenizer_init=True,
        disable_prefill_cuda_graph=sys.argv[2] == "off",
    )
    args.resolve_once()
    found = sglang_api().resolved(args)
    backend = found.cuda_graph_config.prefill.backend
    print(json.dumps([backend, found.mem_fraction_static]), flush=True)
"""


@needs_prefill_graphs
def test_resolved_arguments(tmp_path: Path) -> None:
    """Memory is set aside for the graphs that stay, and for no others."""
    found = {}
    for flag in ("off", "default"):
        path = python_path(tmp_path)
        done = run_python("-c", RESOLVE, str(tmp_path / flag), flag, PYTHONPATH=path)
        assert done.code == 0, done.stderr[-4000:]
        found[flag] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [backend for backend, _ in found["off"]] == ["disabled", "disabled"]
    assert [backend for backend, _ in found["default"]] == ["breakable", "disabled"]
    (heads, latents), (less, same) = (
        [fraction for _, fraction in found[flag]] for flag in ("off", "default")
    )
    assert less < heads and same == latents


# What the prefill runner reads of its attention backend, and what DCP's has there.
# `AttributeError` stands for nothing: the runner has a default then.
READS: dict[str, Any] = {
    "can_run_prefill_cuda_graph": AttributeError,
    "dllm_attention": None,
    "init_forward_metadata": DcpAttentionBackend.init_forward_metadata,
    "prefer_eager_mixed_prefill_under_dp_attention": False,
    "prefill_backend": AttributeError,
    "prefill_cuda_graph_default_max_seq_len": None,
    "prefill_cuda_graph_max_batch_size": None,
    "skips_prefill_metadata_on_idle_dp_rank": False,
    "supports_full_cuda_graph_chunked_prefix": False,
    "supports_prefill_cuda_graph_max_context_size": False,
    "use_captured_forward_metadata_for_breakable_cuda_graph": False,
    "vote_prefill_cuda_graph": AttributeError,
}
# Called for full graphs, for captured metadata or, of `fa_impl_ver`, for FA4 only.
NOT_HERE = {
    "fa_impl_ver",
    "init_forward_metadata_for_breakable_cuda_graph_capture",
    "init_forward_metadata_out_graph",
    "on_after_cuda_graph_warmup",
    "prepare_forward_metadata_for_breakable_cuda_graph_replay",
    "prepare_full_cuda_graph_chunked_prefix",
}
# SGLang's base class: prefill may read shared tables until the forward has ended.
INHERITED = {"resolve_prefill_shared_read_ends"}


def reads_of_backend() -> Iterator[str]:
    srt = Path(sglang.__file__).parent / "srt/model_executor/runner"
    tree = ast.parse((srt / "prefill_cuda_graph_runner.py").read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=owner, attr=name):
                pass
            case ast.Call(
                func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=name), *_]
            ):
                pass
            case _:
                continue
        if re.fullmatch(r"(.*\.)?(prefill_)?attn_backend", ast.unparse(owner)):
            yield str(name)


@needs_prefill_graphs
def test_the_prefill_runner_reads_nothing_else_of_the_backend() -> None:
    assert set(reads_of_backend()) == READS.keys() | NOT_HERE | INHERITED


@needs_prefill_graphs
@pytest.mark.parametrize("name", READS)
def test_what_the_prefill_runner_reads(name: str) -> None:
    assert getattr(DcpAttentionBackend, name, AttributeError) == READS[name]


@needs_prefill_graphs
def test_shared_tables_stay_until_the_forward_has_ended() -> None:
    """Our local table is made from SGLang's before a replay, but other reads are theirs."""
    from sglang.srt.layers.attention.base_attn_backend import (
        AttentionBackend,
        SharedReadEnds,
    )
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    for name in (*INHERITED, "shared_read_ends", "_snapshot_prefill_shared_reads"):
        assert getattr(DcpAttentionBackend, name) is getattr(AttentionBackend, name)
    backend: Any = object.__new__(DcpAttentionBackend)
    assert backend.shared_read_ends(ForwardMode.EXTEND) is SharedReadEnds.UNKNOWN


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
