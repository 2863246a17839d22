"""Gathered K and V: which rows and heads reach which rank, and how kernels are called.

Only this file sees each number that a rank receives, by brute force. It also sees, without
a GPU, what the backends hand to the kernels that attend to gathered rows: stand-ins in
torch, and Triton's own kernel where Triton interprets it.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers import interpreter
from helpers.attention_oracle import Served, Shape, extend, mixed, move
from helpers.backend_groups import serve
from helpers.backend_ranks import FP8, Case
from helpers.mla_kernels_torch import Fa3Mla, FlashInferMha
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import kv_prefill
from sglang_dcp.layers.backends.base import cumulated
from sglang_dcp.layers.backends.fa3 import Fa3Backend
from sglang_dcp.layers.backends.flashinfer import FlashInferBackend
from sglang_dcp.layers.backends.torch_native import TorchNativeBackend
from sglang_dcp.layers.backends.triton import TritonBackend
from sglang_dcp.layers.kv_prefill import KvPrefill, kv_sizes_of
from sglang_dcp.layers.local_batch import Shard
from sglang_dcp.layers.prefix.gather import behind_prefix
from sglang_dcp.layers.prefix.kv_form import KvForm, KvSizes
from sglang_dcp.releases.api import sglang_api

# Query heads of a rank, K/V heads of its pool, ranks.
HEADS = {
    "shared": (4, 1, 2),
    "one-each": (4, 2, 2),
    "two-each": (4, 4, 2),
    "12-3": (6, 3, 2),
    "6-2-dcp3": (2, 2, 3),
    "12-3-dcp4": (3, 3, 4),
    "8-8-dcp4": (2, 8, 4),
    "6-6-dcp3": (2, 6, 3),
}
# Prefix and new tokens of each request.
BATCHES = {
    "ragged": [(0, 3), (1, 1), (13, 2), (6, 5), (2, 1)],
    "one-alone": [(1, 4)],
    "one-and-none": [(0, 2), (1, 1), (0, 1)],
}
QK, V = 3, 2
LAYERS = (2, 3, 4)
# Added to each number of a layer's pool.
LAYER = 100_000


class Spread:
    """Every rank's pool and its gather; a swap is a move between them."""

    def __init__(self, heads: str, batch: str, page: int) -> None:
        self.own_q, self.kv_heads, self.dcp = HEADS[heads]
        self.lens = BATCHES[batch]
        self.served = Served(page, self.dcp)
        for name, (prefix, new) in zip("abcdef", self.lens):
            self.served.grow(name, prefix + new)
        self.sent: dict[int, list[Tensor]] = {}
        self.delivers = False

    def number(self, request: int, position: int, head: int) -> int:
        return (request * 64 + position) * 16 + head

    def pool(self, rank: int) -> Any:
        slots = 400 * self.served.page_size
        keys = torch.full((slots, self.kv_heads, QK), float("nan"))
        for request, name in enumerate(self.served.rows):
            for position, slot in self.served.local_slots(name, rank).items():
                for head in range(self.kv_heads):
                    keys[slot, head] = self.number(request, position, head)
        values = -keys[..., :V]
        return SimpleNamespace(
            get_key_buffer=lambda layer: keys + layer * LAYER,
            get_value_buffer=lambda layer: values - layer * LAYER,
            start_layer=LAYERS[0],
            layer_num=len(LAYERS),
        )

    def batch(self) -> Any:
        prefix, new = map(list, zip(*self.lens))
        rows = torch.tensor(list(self.served.rows.values()))
        return SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda: True),
            req_pool_indices=rows,
            extend_prefix_lens=torch.tensor(prefix),
            extend_prefix_lens_cpu=prefix,
            extend_seq_lens=torch.tensor(new),
            extend_seq_lens_cpu=new,
        )

    def swap(self, rank: int) -> Any:
        peers = [peer for peer in range(self.dcp) if peer != rank]
        turns = itertools.count()

        def swap_rows(sent: Tensor, received: Tensor) -> None:
            assert sent.is_contiguous() and received.is_contiguous()
            if not self.delivers:
                self.sent.setdefault(rank, []).append(sent.clone())
                return
            turn = next(turns)
            for place, peer in enumerate(peers):
                received[place] = self.sent[peer][turn][rank - (rank > peer)]

        return SimpleNamespace(swap_rows=swap_rows)

    def gathered(self) -> list[list[tuple[Tensor, Tensor]]]:
        """K and V of each rank and layer. The first round only tells what is sent."""
        sizes = KvSizes(self.own_q, self.kv_heads, self.dcp, QK, V, 4)
        table, page = self.served.table, self.served.page_size
        prefills = []
        for rank in range(self.dcp):
            shard = Shard(table, torch.empty(0), self.dcp, rank, page)
            backend: Any = None
            more = self.swap(rank), self.pool(rank), sizes
            prefills.append(KvPrefill(backend, shard, *more))
        for prefill in prefills:
            prefill.init_forward_metadata(self.batch())
            assert prefill.gathers
        for self.delivers in (False, True):
            found = [
                [
                    prefill._of_layer(prefill._plan.gather, self.own_q, n)  # type: ignore
                    for n in LAYERS
                ]
                for prefill in prefills
            ]
        # No layer's K and V outlive the forward.
        assert all(prefill._ahead is None for prefill in prefills)
        return found

    def wanted(self, rank: int) -> Tensor:
        """[positions, local query heads]: each with the K/V head of its group."""
        group = self.own_q * self.dcp // self.kv_heads
        heads = [(rank * self.own_q + q) // group for q in range(self.own_q)]
        numbers = [
            [self.number(request, position, head) for head in heads]
            for request, (prefix, _) in enumerate(self.lens)
            for position in range(prefix)
        ]
        return torch.tensor(numbers, dtype=torch.float32)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix is gathered."""
    monkeypatch.setattr(kv_prefill, "choose_kv_form", lambda *args: KvForm.GATHERED)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("page, at_once", [(1, 1), (4, 2), (4, 3), (1, 9)])
@pytest.mark.parametrize("heads, batch", itertools.product(HEADS, BATCHES))
def test_each_query_head_meets_its_positions_in_order(
    heads: str, batch: str, page: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KvSizes, "layers_at_once", lambda sizes, positions: at_once)
    spread = Spread(heads, batch, page)
    for rank, layers in enumerate(spread.gathered()):
        assert len(spread.sent[rank]) == -(-len(LAYERS) // at_once)
        for layer, (k, v) in zip(LAYERS, layers):
            prefix, new = map(list, zip(*spread.lens))
            rows = behind_prefix(prefix, new, k.device)
            assert len(k) == len(v) == sum(prefix) + sum(new)
            k, v = k[rows.prefix], v[rows.prefix]
            # As a kernel reads them: equally many query heads for each K/V head.
            assert spread.own_q % k.shape[1] == 0
            by_query = k.repeat_interleave(spread.own_q // k.shape[1], 1)
            assert by_query.shape[2] == QK and v.shape[1:] == (k.shape[1], V)
            wanted = spread.wanted(rank)[..., None] + layer * LAYER
            assert torch.equal(by_query, wanted.expand(-1, -1, QK))
            assert torch.equal(v, -k[..., :V])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("heads", HEADS)
def test_no_more_heads_travel_than_a_window(heads: str) -> None:
    spread = Spread(heads, "ragged", 1)
    spread.gathered()
    own_q, kv_heads, dcp = HEADS[heads]
    window = KvSizes(own_q, kv_heads, dcp, QK, V).window
    rows = max(
        sum(len(range(r, prefix, dcp)) for prefix, _ in BATCHES["ragged"])
        for r in range(dcp)
    )
    shapes = {tuple(sent.shape) for [sent] in spread.sent.values()}
    assert shapes == {(dcp - 1, len(LAYERS) * rows, window * (QK + V))}
    group = own_q * dcp / kv_heads
    most = max(
        int((r + 1) * own_q / group - 1e-9) - int(r * own_q / group) + 1
        for r in range(dcp)
    )
    assert window == most


@pytest.mark.usefixtures("always")
def test_a_decode_step_after_a_prefill_gathers_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "sglang_dcp")
    spread = Spread("one-each", "ragged", 1)
    shard = Shard(spread.served.table, torch.empty(0), 2, 0, 1)
    backend: Any = None
    parts = backend, shard, spread.swap(0), spread.pool(0)
    prefill = KvPrefill(*parts, KvSizes(4, 2, 2, QK, V))
    for _ in range(2):
        prefill.init_forward_metadata(spread.batch())
    assert prefill.gathers
    assert caplog.messages == ["DCP prefill gathers K and V of 22 positions"]
    step = SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False))
    prefill.init_forward_metadata(step)
    assert not prefill.gathers
    in_place = KvPrefill(*parts, None)
    in_place.init_forward_metadata(spread.batch())
    assert not in_place.gathers


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("heads", ["one-each", "two-each", "12-3"])
def test_new_tokens_lie_behind_the_prefix_of_their_request(heads: str) -> None:
    """Each query head meets the prefix and then the new tokens of its K/V head."""
    spread = Spread(heads, "ragged", 1)
    spread.gathered()
    own_q, kv_heads, dcp = HEADS[heads]
    tokens = sum(new for _, new in spread.lens)
    rank = dcp - 1
    of_queries = spread.wanted(rank)
    heads_of = [(rank * own_q + q) // (own_q * dcp // kv_heads) for q in range(own_q)]
    # Told apart from all that is stored.
    new = -1.0 - torch.arange(tokens)[:, None] * 16 - torch.arange(kv_heads)
    seen: list[Any] = []

    def extend_ragged(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Any:
        seen.append((k.clone(), v.clone(), more[-1]))
        return torch.zeros(tokens, own_q, V), torch.zeros(tokens, own_q)

    backend: Any = SimpleNamespace(extend_ragged=extend_ragged)
    shard = Shard(spread.served.table, torch.empty(0), dcp, rank, 1)
    sizes = KvSizes(own_q, kv_heads, dcp, QK, V, 4)
    prefill = KvPrefill(backend, shard, spread.swap(rank), spread.pool(rank), sizes)
    batch = spread.batch()
    prefill.init_forward_metadata(batch)
    for number in LAYERS:
        layer: Any = SimpleNamespace(layer_id=number)
        k = new[..., None].expand(-1, -1, QK) - number * LAYER
        q = torch.zeros(tokens, own_q, QK)
        prefill.attend(q, k, -k[..., :V], layer, batch)
    for number, (k, v, keys) in zip(LAYERS, seen, strict=True):
        assert keys.prefix_chunk is None and keys.ends.tolist()[0] == 0
        assert keys.ends.diff().tolist() == keys.lens
        by_query = k.repeat_interleave(own_q // k.shape[1], 1)[..., 0]
        assert torch.equal(v, -k[..., :V])
        of_prefix = iter(of_queries + number * LAYER)
        of_new = iter(new[:, heads_of] - number * LAYER)
        for (prefix, added), rows in zip(spread.lens, by_query.split(keys.lens)):
            assert all(torch.equal(row, next(of_prefix)) for row in rows[:prefix])
            assert all(torch.equal(row, next(of_new)) for row in rows[prefix:])
            assert len(rows) == prefix + added


STEPS = [
    extend(a=1, b=7, c=30, d=66),
    mixed(a=5, d=20, b=1, e=40, c=9),
    mixed(f=1),
    mixed(f=1, a=1),
    move("cd"),
    mixed(c=3, d=1, f=7),
]
BASE = Case("fa3", Shape(8, 2, 32, 32), device="cpu", max_len=120, gathers=True)
CASES = {
    "dcp2": BASE,
    "dcp2-page16": replace(BASE, page_size=16),
    "dcp3": replace(BASE, shape=Shape(12, 2, 32, 32), dcp_size=3, page_size=4),
    "dcp4": replace(BASE, dcp_size=4),
    "uneven-12-3": replace(BASE, shape=Shape(12, 3, 32, 32)),
    "no-grouping": replace(BASE, shape=Shape(8, 8, 32, 32)),
    "fp16": replace(BASE, dtype=torch.float16),
}


def fa3(case: Case, runner: Any) -> Any:
    return Fa3Backend(Fa3Mla(runner))


def flashinfer(case: Case, runner: Any) -> Any:
    pool = runner.token_to_kv_pool
    inner = SimpleNamespace(prefill_wrappers_paged=[None], token_to_kv_pool=pool)
    return FlashInferBackend(inner, FlashInferMha)


def native(case: Case, runner: Any) -> Any:
    return TorchNativeBackend.from_runner(runner)


class TritonPlans:
    """How SGLang's Triton backend plans a prefill. The kernel is SGLang's."""

    get_num_kv_splits = None

    def __init__(self, runner: Any) -> None:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        self.page_size, self.token_to_kv_pool = (
            runner.page_size,
            runner.token_to_kv_pool,
        )
        self.extend_attention_fwd = extend_attention_fwd

    def init_forward_metadata(self, local: Any) -> None:
        # The prefix in place is not read here.
        nothing = torch.zeros(len(local.seq_lens) + 1, dtype=torch.int32)
        self.forward_metadata = SimpleNamespace(
            qo_indptr=cumulated(local.extend_seq_lens),
            kv_indptr=nothing,
            kv_indices=torch.zeros(1, dtype=torch.int64),
            max_extend_len=max(local.extend_seq_lens_cpu),
        )


def triton(case: Case, runner: Any) -> Any:
    return TritonBackend(TritonPlans(runner))


@pytest.fixture
def no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)


@pytest.mark.usefixtures("no_event")
@pytest.mark.parametrize("make", [fa3, flashinfer, native], ids=lambda m: m.__name__)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64_over_all_keys(name: str, make: Any) -> None:
    serve(CASES[name], STEPS, None, make)


INTERPRETED = ("dcp2-page16", "uneven-12-3")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return interpreter.results_of(__file__)


@pytest.mark.long
@pytest.mark.parametrize("name", INTERPRETED)
def test_tritons_kernel_takes_gathered_rows(
    name: str, interpreted: dict[str, str]
) -> None:
    assert interpreted[name] == ""


def fault_of(name: str) -> str:
    """What is wrong with a case; "" if nothing is."""
    # The interpreter has no bfloat16.
    case = replace(CASES[name], dtype=torch.float16)
    steps = [extend(a=1, b=7, c=30), mixed(a=5, b=1, d=20, c=9), mixed(d=1, a=2)]
    try:
        serve(case, steps, None, triton)
    except AssertionError as error:
        return str(error)
    return ""


class Runner:
    """What is read of a `ModelRunner`, of Qwen3-30B-A3B at tp 2."""

    def __init__(self, device: str, backend: str = "fa3", **changes: Any) -> None:
        from sglang.srt.configs.model_config import AttentionArch

        arch = changes.pop("arch", AttentionArch.MHA)
        self.device, self.dtype = device, torch.bfloat16
        stored = changes.pop("stored", torch.bfloat16)
        self.token_to_kv_pool = SimpleNamespace(dtype=stored)
        self.server_args = SimpleNamespace(
            attention_backend=backend,
            enable_deterministic_inference=changes.pop("deterministic", False),
            speculative_algorithm=None,
            speculative_num_draft_tokens=None,
        )
        self.model_config = SimpleNamespace(
            attention_arch=arch,
            get_total_num_kv_heads=lambda: 8,
            head_dim=128,
            hf_text_config=SimpleNamespace(dcp_kv_head_scale=2),
            num_attention_heads=32,
            v_head_dim=128,
        )


CONFIG = DcpConfig(Layout(2, 1), "a2a")


@pytest.fixture
def as_given() -> Any:
    resolved = staticmethod(lambda args: args)
    with mock.patch.object(type(sglang_api()), "resolved", resolved):
        yield


@pytest.mark.usefixtures("as_given")
def test_sizes_are_those_of_the_runner() -> None:
    runner = Runner("cpu", "torch_native")
    assert kv_sizes_of(runner, CONFIG) == KvSizes(16, 4, 2, 128, 128)


@pytest.mark.usefixtures("as_given")
def test_quantized_kv_latents_and_plain_tp_stay_in_place() -> None:
    from sglang.srt.configs.model_config import AttentionArch

    assert kv_sizes_of(Runner("cpu", stored=FP8), CONFIG) is None
    assert kv_sizes_of(Runner("cpu", arch=AttentionArch.MLA), CONFIG) is None
    assert kv_sizes_of(Runner("cpu"), DcpConfig(Layout(2, 2), "a2a")) is None


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
def test_gpus_gather_only_with_backends_that_were_compared(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_prefill, "sglang_version", lambda: "0.5.23")
    assert kv_sizes_of(Runner("cuda", backend), CONFIG) is not None
    assert kv_sizes_of(Runner("cuda", "torch_native"), CONFIG) is None
    monkeypatch.setattr(kv_prefill, "sglang_version", lambda: "0.5.16")
    assert kv_sizes_of(Runner("cuda", backend), CONFIG) is None
    assert kv_sizes_of(Runner("cpu", backend), CONFIG) is not None


@pytest.mark.usefixtures("as_given")
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton", "torch_native"])
def test_only_fa3_splits_gathered_keys(backend: str) -> None:
    """In deterministic inference it does not either."""
    sizes = kv_sizes_of(Runner("cpu", backend), CONFIG)
    assert sizes is not None and (sizes.split_below > 0) == (backend == "fa3")
    fixed = kv_sizes_of(Runner("cpu", backend, deterministic=True), CONFIG)
    assert fixed == sizes._replace(split_below=0)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        print(json.dumps({name: fault_of(name) for name in INTERPRETED}))
        sys.exit(0)
    sys.exit(pytest.main([__file__]))
