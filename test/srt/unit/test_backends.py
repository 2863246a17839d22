"""What the GPU backends do around their kernels: order of plans, scales, dtypes.

Only this file sees, without a race to wait for, that a FlashInfer plan is not made before
the last one has left its buffer. It alone sees that scales go with a quantized cache only,
and that Triton's splits are counted for one key at least. Nor does another see, without a GPU, that
the installed FlashInfer takes our calls for heads.
"""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.layers.backends import base, fa3, flashinfer, triton
from sglang_dcp.layers.backends.capabilities import FP8

REQUESTS, KV_HEADS = 2, 3


class Recorder:
    """Stands for whatever a plan touches; notes the calls in one list."""

    def __init__(self, calls: list[str], name: str) -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, what: str) -> Any:
        def note(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self._calls.append(f"{self._name}.{what}")
            return torch.zeros(5, 4, 8), torch.zeros(5, 4)

        return note


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[str]]:
    """A FlashInfer backend over recorders, and what they note."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: Recorder(calls, "event"))
    monkeypatch.setattr(
        flashinfer.FlashInferBackend, "_slots", lambda self, local: torch.zeros(4)
    )
    inner: Any = Recorder(calls, "inner")
    inner.prefill_wrappers_paged = [Recorder(calls, "paged")]
    inner.indices_updater_prefill = SimpleNamespace(
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=8,
        q_data_type=torch.bfloat16,
        data_type=torch.bfloat16,
    )
    names = iter(("ragged", "gathered"))
    backend = flashinfer.FlashInferBackend(inner, lambda: Recorder(calls, next(names)))
    return backend, calls


def extend_batch(prefix: int) -> Any:
    mode = SimpleNamespace(is_extend=lambda: True)
    return SimpleNamespace(
        forward_mode=mode,
        extend_prefix_lens_cpu=[prefix, 0],
        extend_seq_lens_cpu=[3, 2],
    )


def gathered_keys(batch: Any) -> Any:
    parts = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    lens = [prefix + new for prefix, new in zip(*parts)]
    return base.RaggedKeys(None, lens, base.cumulated(torch.tensor(lens)))


@pytest.mark.parametrize("gathers", [False, True], ids=["in-place", "gathered"])
def test_an_extend_plan_waits_for_the_last_one(gathers: bool, planned: Any) -> None:
    backend, calls = planned
    batch, q = extend_batch(prefix=4), torch.zeros(5, 4, 8)
    backend._inner.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda i: (q, q))
    layer = SimpleNamespace(scaling=1.0, layer_id=0)
    keys = gathered_keys(batch)
    for _ in range(2):
        backend.init_forward_metadata(batch, batch)
        for _ in range(2):
            backend.extend_new_tokens(q, q, q, layer, batch)
            if gathers:
                backend.extend_ragged(q, q[:4], q[:4], layer, batch, keys)
            else:
                backend.extend_paged_prefix(q, layer, batch)
    wrapper = "gathered" if gathers else "paged"
    once = ["event.synchronize", "event.record"]
    # The first layer plans, and what it planned is waited for as well.
    for name in ("ragged", wrapper):
        once += [f"{name}.plan", "event.record", f"{name}.forward_return_lse"]
    once += ["ragged.forward_return_lse", f"{wrapper}.forward_return_lse"]
    assert calls == once * 2


def test_without_a_prefix_nothing_is_planned_for_one(planned: Any) -> None:
    backend, calls = planned
    batch = extend_batch(prefix=0)
    backend.init_forward_metadata(batch, batch)
    assert calls == ["event.synchronize", "event.record"]


def test_decode_plans_wait_too(planned: Any) -> None:
    backend, calls = planned
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False))
    backend.init_forward_metadata(batch, batch)
    backend.init_graph_metadata(batch, in_capture=False)
    assert calls == [
        "event.synchronize",
        "inner.init_forward_metadata",
        "event.record",
        "event.synchronize",
        "inner.init_forward_metadata_out_graph",
        "event.record",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_decode_and_prefix_read_the_cache_alike(
    dtype: torch.dtype, planned: Any
) -> None:
    """They differ in the wrapper, and in `causal`, which decode's does not take."""
    backend, _ = planned
    cache = torch.zeros(4, KV_HEADS, 8).to(dtype), torch.zeros(4, KV_HEADS, 8).to(dtype)
    seen: list[Any] = []

    class Wrapper:
        def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return torch.zeros(5, 4, 8), torch.zeros(5, 4)

    backend._prefix, backend._prefix_planned = Wrapper(), True
    backend._inner.forward_metadata = SimpleNamespace(decode_wrappers=[Wrapper()])
    backend._inner.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda i: cache)
    layer = SimpleNamespace(**vars(scaled_layer()), scaling=0.25, layer_id=0)
    q = torch.ones(5, 4, 8)
    backend.decode(q, layer, None)
    backend.extend_paged_prefix(q, layer, None)
    scale = 0.5 if dtype == FP8 else None
    wanted = dict(sm_scale=0.25, k_scale=scale, v_scale=scale)
    assert [kwargs for _, kwargs in seen] == [wanted, {**wanted, "causal": False}]
    assert all(args[0] is q and args[1] is cache for args, _ in seen)


def signature(file: str, kind: str, method: str) -> inspect.Signature:
    """Of a method of FlashInfer's, read from its source: names, and which may be left."""
    root = Path(inspect.getfile(torch)).parents[1] / "flashinfer"
    tree = ast.parse((root / file).read_text())
    [body] = [
        n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind
    ]
    methods = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == method]
    # Behind its overloads.
    args = methods[-1].args
    required = len(args.args) - len(args.defaults)
    either, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(arg.arg, either, default=empty if at < required else None)
        for at, arg in enumerate(args.args)
    ]
    return inspect.Signature(parameters[1:])


PAGED = "prefill.py", "BatchPrefillWithPagedKVCacheWrapper"
RAGGED = "prefill.py", "BatchPrefillWithRaggedKVCacheWrapper"
DECODE = "decode.py", "BatchDecodeWithPagedKVCacheWrapper"


def test_the_installed_flashinfer_takes_our_calls(planned: Any) -> None:
    backend, _ = planned
    seen: dict[tuple[str, str, str], dict[str, Any]] = {}

    class Wrapper:
        def __init__(self, file: str, kind: str) -> None:
            self._kind = file, kind

        def __getattr__(self, method: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
                known = signature(*self._kind, method)
                seen[*self._kind, method] = known.bind(*args, **kwargs).arguments
                return torch.zeros(5, 4, 8), torch.zeros(5, 4)

            return call

    cache = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    wrappers = SimpleNamespace(decode_wrappers=[Wrapper(*DECODE)])
    backend._prefix, backend._new_tokens = Wrapper(*PAGED), Wrapper(*RAGGED)
    backend._gathered = Wrapper(*RAGGED)
    backend._inner.forward_metadata = wrappers
    backend._inner.token_to_kv_pool = SimpleNamespace(get_kv_buffer=lambda i: cache)
    layer = SimpleNamespace(**vars(scaled_layer()), scaling=0.25, layer_id=0)
    batch, q, kv = extend_batch(prefix=4), torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    backend.init_forward_metadata(batch, batch)
    backend.extend_new_tokens(q, kv, kv, layer, batch)
    backend.extend_paged_prefix(q, layer, batch)
    backend.decode(q, layer, batch)
    sizes = dict(num_qo_heads=4, num_kv_heads=2, head_dim_qk=8)
    for kind, ends, causal in ((PAGED, [0, 4, 4], False), (RAGGED, [0, 3, 5], True)):
        plan = seen[*kind, "plan"]
        assert plan["qo_indptr"].tolist() == [0, 3, 5]
        starts = plan.get("kv_indptr", plan.get("paged_kv_indptr"))
        assert starts.tolist() == ends and plan["causal"] == causal
        assert sizes.items() <= plan.items()
        assert seen[*kind, "forward_return_lse"]["sm_scale"] == 0.25
    assert seen[*PAGED, "plan"]["page_size"] == 1
    backend.init_forward_metadata(batch, batch)
    keys = torch.zeros(9, 2, 8)
    backend.extend_ragged(q, keys, keys, layer, batch, gathered_keys(batch))
    plan, how = (seen[*RAGGED, name] for name in ("plan", "forward_return_lse"))
    assert sizes.items() <= plan.items() and plan["causal"] and how["causal"]
    assert plan["qo_indptr"].tolist() == [0, 3, 5]
    assert plan["kv_indptr"].tolist() == [0, 7, 9] and how["sm_scale"] == 0.25
    assert seen[*DECODE, "forward_return_lse"]["paged_kv_cache"] is cache


def scaled_layer() -> Any:
    scale = torch.tensor(0.5)
    return SimpleNamespace(
        k_scale=scale, v_scale=scale, k_scale_float=0.5, v_scale_float=0.5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=str)
def test_scales_go_with_a_quantized_cache_alone(dtype: torch.dtype) -> None:
    """A checkpoint's scales are loaded whatever the cache's dtype is."""
    keys, layer = torch.zeros(4, KV_HEADS, 8).to(dtype), scaled_layer()
    quantized = dtype == FP8
    assert base.kv_scales(layer, keys) == ((0.5, 0.5) if quantized else (None, None))
    assert triton._scales(layer, keys) == ([0.5, 0.5] if quantized else [1.0, 1.0])
    descales = fa3._descales(layer, dtype, REQUESTS, KV_HEADS)
    shapes = {name: tuple(scale.shape) for name, scale in descales.items()}
    names = ("k_descale", "v_descale") if quantized else ()
    assert shapes == dict.fromkeys(names, (REQUESTS, KV_HEADS))


def test_a_cache_without_scales_has_none() -> None:
    layer = SimpleNamespace(k_scale=None, k_scale_float=None, v_scale_float=None)
    keys = torch.zeros(4, KV_HEADS, 8).to(FP8)
    assert base.kv_scales(layer, keys) == (None, None)
    assert triton._scales(layer, keys) == [1.0, 1.0]
    assert fa3._descales(layer, FP8, REQUESTS, KV_HEADS) == {}


# Of a decode step SGLang 0.5.23 passes one argument more than 0.5.16.
@pytest.mark.parametrize("more", [(), (torch.zeros(1),)], ids=["two", "three"])
def test_triton_splits_an_empty_shard_as_one_key(
    more: tuple[torch.Tensor, ...],
) -> None:
    """SGLang divides by the shortest length. The kernels' lengths stay as they are."""
    seen: list[tuple[torch.Tensor, ...]] = []
    inner = SimpleNamespace(get_num_kv_splits=lambda *args: seen.append(args))
    triton.TritonBackend(inner)
    splits, lens = torch.zeros(3), torch.tensor([0, 5, 1])
    inner.get_num_kv_splits(splits, lens, *more)
    [(passed, clamped, *rest)] = seen
    assert passed is splits and clamped.tolist() == [1, 5, 1]
    assert len(rest) == len(more) and all(map(operator.is_, rest, more))
    assert lens.tolist() == [0, 5, 1]


def test_fa3_answers_in_the_querys_dtype() -> None:
    """Of fp8 queries the kernel makes bfloat16, also for a float16 model."""
    returned = torch.zeros(5, 4, 8, dtype=torch.bfloat16), torch.zeros(4, 5), None
    partial = fa3.as_partial(returned, torch.float16)
    assert partial.out.dtype == torch.float16 and partial.lse.shape == (5, 4)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
