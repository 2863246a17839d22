"""What a prefill with DCP allocates, against tensors counted while the real code runs.

Only this file and `test_decode_memory.py` compare the number in the log with what the code
allocates. The kernels only allocate; everything between them is the package's own code.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ContextManager, NamedTuple
from unittest import mock

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig

from helpers import mla_expanded
from helpers.allocating_ranks import (
    Served,
    allocating_backend,
    serving,
    total,
    without_splits,
)
from helpers.attention_oracle import Shape, extend
from helpers.backend_ranks import FP8, Case
from helpers.kernels_that_allocate import (
    SilentGroup,
    allocating_kernels,
    fa3_splits,
    fa3_tile,
)
from helpers.live_bytes import LiveBytes
from helpers.mla_expanded import DEEPSEEK, Prefill
from sglang_dcp import context
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, set_context
from sglang_dcp.demo.tiny_model import make_tiny_model
from sglang_dcp.distributed.exchange import create_exchange
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers import memory_report
from sglang_dcp.layers.backends.fa3_splits import (
    PREFIX_SPLIT_BYTES,
    Fa3Heads,
    most_splits,
    prefix_splits,
    ragged_split_bytes,
    ragged_splits,
)
from sglang_dcp.layers.decode_memory import decode_parts
from sglang_dcp.layers.forward_memory import (
    expanded_parts,
    gather_bytes,
    gathered_parts,
    plan_bytes,
    prefill_parts,
)
from sglang_dcp.layers.forward_sizes import Expansion, ForwardSizes
from sglang_dcp.layers.memory_report import (
    admit_prompts,
    forward_sizes,
    fraction_that_fits,
    longest_that_fits,
)
from sglang_dcp.layers.mla.cost import MlaSizes, Requests
from sglang_dcp.layers.mla.form import (
    MOST_PREFIX_CHUNKS,
    PrefillBatch,
    PrefillForm,
    choose_prefill_form,
)
from sglang_dcp.layers.mla.groups import MOST_IN_PLACE_TOKENS
from sglang_dcp.layers.mla.latents import gather_latents
from sglang_dcp.layers.prefix import kv_form
from sglang_dcp.layers.prefix.gather import plan_gather, split_into_chunks
from sglang_dcp.layers.prefix.kv_form import MOST_GATHERED_BYTES, KvForm, KvSizes
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version

GQA = Shape(8, 2, 64, 64)
UNEVEN = Shape(24, 3, 64, 64)
MLA = Shape(8, 1, 576, 512, latent=True)
NEW = dict(a=70, b=150)
TOKENS = sum(NEW.values())
SPLITS = "splits of the kernel"

CASES = {
    "gqa": (Case("fa3", GQA, device="cpu"), "a2a"),
    "gqa-dcp4": (Case("fa3", GQA, dcp_size=4, device="cpu"), "a2a"),
    "gqa-fp8": (
        # FA3 returns bfloat16 here, so outputs are copied too.
        Case("fa3", GQA, torch.float16, FP8, scale=2.0, device="cpu"),
        "a2a",
    ),
    "gqa-uneven": (Case("fa3", UNEVEN, device="cpu"), "a2a"),
    "gqa-ag_rs": (Case("fa3", GQA, device="cpu"), "ag_rs"),
    "mla": (Case("fa3", MLA, device="cpu"), "a2a"),
    "mla-dcp4": (Case("fa3", MLA, dcp_size=4, device="cpu"), "ag_rs"),
}
EXPANDED = Expansion(512, 64, 128, 128, 1 << 17)
LITE = ForwardSizes("fa3", 8, 2, 1, 1, 576, 512, 2, 2, latent=True, expansion=EXPANDED)
QWEN = ForwardSizes("fa3", 8, 2, 1, 1, 128, 128, 2, 2)
GATHERS = in_range(sglang_version(), kv_form.SERVED_SINCE, None)
# What a server of this release takes, by the rule of the form.
QWEN_SERVED = QWEN._replace(gathered=MOST_GATHERED_BYTES // 512 * GATHERS)


def served(name: str) -> ContextManager[tuple[Served, ForwardSizes]]:
    return serving(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_forward_allocates_what_is_told(name: str) -> None:
    with served(name) as (at_work, sizes):
        sizes = without_splits(at_work, sizes)
        at_work.peak(extend(**NEW))
        prefill = at_work.peak(extend(**NEW))
    told = total(prefill_parts(sizes, TOKENS))
    assert prefill <= told <= 1.05 * prefill


@contextmanager
def gathering(name: str, **prefixes: int) -> Iterator[tuple[Served, ForwardSizes]]:
    """A rank that gathers these prefixes, and its sizes."""
    case = replace(CASES[name][0], gathers=True)
    with (
        serving(case) as (at_work, sizes),
        mock.patch(
            "sglang_dcp.layers.kv_prefill.choose_kv_form",
            lambda *args: KvForm.GATHERED,
        ),
        # As where one layer fills what several may take.
        mock.patch.object(KvSizes, "layers_at_once", lambda *args: 1),
    ):
        silent: Any = SilentGroup(case.dcp_size)
        at_work.rank.backend.kv_prefill._exchange = create_exchange("a2a", silent)
        for request, prefix in prefixes.items():
            at_work.group.served.grow(request, prefix)
        yield at_work, sizes._replace(gathered=sum(prefixes.values()))


GATHERED_CASES = ("gqa", "gqa-dcp4", "gqa-uneven")


@pytest.mark.parametrize("name", GATHERED_CASES)
def test_a_gathered_prefix_takes_what_is_told(name: str) -> None:
    """Rows for the rank with most of them are padded by a position of each request."""
    with gathering(name, a=300, b=700) as (at_work, sizes):
        sizes = without_splits(at_work, sizes)
        gathered = at_work.peak(extend(a=20, b=50))
    told = total(gathered_parts(sizes, 70))
    assert gathered <= told <= 1.1 * gathered
    assert told <= total(prefill_parts(sizes, 70))


def ragged_calls(at_work: Served) -> list[tuple[bool, int | None]]:
    return list(at_work.inner.ragged_splits)


@pytest.mark.parametrize("name", GATHERED_CASES)
def test_a_gathered_prefix_and_new_tokens_are_split_in_one_call(name: str) -> None:
    with gathering(name, a=300, b=1100) as (at_work, sizes):
        split = at_work.peak(extend(a=20, b=50))
        kept = sizes.kept_kv_heads
    heads = Fa3Heads(sizes.heads, kept, sizes.qk_dim, sizes.v_dim)
    splits = ragged_splits(heads, 70, 50, 1100 + 50)
    assert splits > 1
    assert ragged_calls(at_work) == [(True, splits)]
    told = total(gathered_parts(sizes, 70))
    assert split <= told
    assert splits * heads.split_bytes(70) <= gathered_parts(sizes, 70)[SPLITS]


def test_deterministic_inference_splits_no_gathered_prefix() -> None:
    with gathering("gqa", a=1400) as (at_work, sizes):
        without_splits(at_work, sizes)
        at_work.peak(extend(a=20))
    assert ragged_calls(at_work) == [(True, 1)]


def test_splits_of_any_gathered_prefix_are_told() -> None:
    """Of one request with all new tokens, and of many with few."""
    for served in (QWEN, QWEN._replace(heads=16, kv_heads=4, kept_kv_heads=2)):
        sizes = served._replace(gathered=1 << 17)
        heads = Fa3Heads(sizes.heads, sizes.kept_kv_heads, 128, 128)
        for tokens in (1, 64, 500, 1000, 8192):
            told = total(gathered_parts(sizes, tokens))
            # K and V in order, queries, and two outputs.
            rows = tokens * sizes.heads
            held = (1 << 17) * sizes.kept_kv_heads * 256 * 2
            held += rows * 128 * 2 + 2 * rows * (128 * 2 + 4)
            for longest in {1, 16, 64, tokens}:
                splits = ragged_splits(heads, tokens, min(longest, tokens), 1 << 17)
                split = splits * heads.split_bytes(tokens) if splits > 1 else 0
                assert held + split <= told, (tokens, longest)


def test_a_gathered_prefix_is_bounded_whatever_the_heads() -> None:
    """Beside what grows with the chunk: three times the bound, at most."""
    for heads, kv_heads, dcp in (
        (4, 1, 2),
        (16, 4, 2),
        (16, 16, 2),
        (4, 2, 8),
        (6, 3, 2),
    ):
        kv = KvSizes(heads, kv_heads, dcp, 128, 128)
        sizes = QWEN._replace(
            heads=heads, kv_heads=kv_heads, dcp_size=dcp, gathered=kv.most_positions
        )
        told = total(gathered_parts(sizes, 1))
        assert MOST_GATHERED_BYTES < told <= 3.1 * MOST_GATHERED_BYTES, sizes
    assert gathered_parts(QWEN, 8192) == {}


FA3_HEADS = [
    Fa3Heads(heads, kv, *dims)
    for heads, kv, dims in itertools.product(
        (8, 16, 32, 128), (1, 2, 4), ((64, 64), (96, 96), (128, 128), (256, 256))
    )
] + [Fa3Heads(heads, 1, 576, 512) for heads in (8, 16, 64, 128)]


def own_choice(heads: Fa3Heads, longest: int, keys: int) -> int:
    """What FA3 takes if it may choose, for queries that are not causal."""
    rows = longest * heads.heads // heads.kv_heads
    # Of MLA, K is the rotary part.
    dims = heads.qk_dim + (0 if heads.v_dim > 256 else heads.v_dim)
    tile = fa3_tile(0 if heads.v_dim > 256 else heads.qk_dim, heads.v_dim)
    return fa3_splits(rows, heads.kv_heads, keys, dims, tile, causal=False)


@pytest.mark.parametrize("heads", FA3_HEADS, ids=lambda h: "-".join(map(str, h)))
def test_splits_of_a_prefix_are_bounded_at_every_length(heads: Fa3Heads) -> None:
    for tokens, longest in itertools.product((1, 64, 1000, 8192, 65536), repeat=2):
        if longest > tokens:
            continue
        for keys in (1, 5000, 1 << 17, 1 << 22):
            asked = prefix_splits(heads, tokens, longest)
            splits = asked or own_choice(heads, longest, keys)
            taken = splits * heads.split_bytes(tokens)
            assert splits == 1 or taken <= PREFIX_SPLIT_BYTES, (tokens, longest, keys)


@pytest.mark.parametrize("heads", FA3_HEADS, ids=lambda h: "-".join(map(str, h)))
def test_splits_of_gathered_keys_are_bounded_at_every_length(heads: Fa3Heads) -> None:
    for tokens, longest in itertools.product((1, 64, 1000, 8192, 65536), repeat=2):
        if longest > tokens:
            continue
        for keys in (1, 511, 5000, 1 << 17, 1 << 22):
            splits = ragged_splits(heads, tokens, longest, keys)
            # FA3 takes up to 256, and 0 would be its own choice.
            assert 1 <= splits <= 128
            taken = splits * heads.split_bytes(tokens)
            assert splits == 1 or taken <= PREFIX_SPLIT_BYTES, (tokens, longest, keys)
            assert splits == 1 or splits * 512 <= keys


def test_many_heads_fill_the_gpu_without_splits() -> None:
    assert ragged_split_bytes(Fa3Heads(128, 128, 192, 128), 8192) == 0


def test_splits_of_a_short_turns_gathered_keys_fill_the_gpu() -> None:
    """100 tokens x 4 heads are 4 tiles of rows, for 132 SMs."""
    heads = Fa3Heads(4, 1, 128, 128)
    assert ragged_splits(heads, 100, 100, 30720) == 33
    # Not so many that a split has few keys, nor where tiles alone fill the GPU.
    assert ragged_splits(heads, 100, 100, 2048) == 4
    assert ragged_splits(heads, 100, 100, 500) == 1
    assert ragged_splits(heads, 8192, 8192, 1 << 17) == 1


def test_fa3_alone_would_split_a_long_prefix_without_a_bound() -> None:
    """8192 tokens of 32 heads: one split more for each 50 MB of latents."""
    heads = Fa3Heads(32, 1, 576, 512)
    alone = [own_choice(heads, 8192, keys) for keys in (1 << 16, 1 << 18, 1 << 20)]
    assert alone == [2, 6, 24]
    assert alone[-1] * heads.split_bytes(8192) > 12e9
    assert prefix_splits(heads, 8192, 8192) == 1


def test_a_short_turn_leaves_the_splits_to_fa3() -> None:
    assert prefix_splits(Fa3Heads(16, 1, 576, 512), 64, 64) == 0
    assert prefix_splits(Fa3Heads(16, 1, 128, 128), 64, 64) == 0


def test_the_most_splits_are_those_of_some_number_of_keys() -> None:
    for tiles in range(1, 140):
        keys = [64 * n for n in range(1, 200)]
        chosen = [fa3_splits(64 * tiles, 1, n, 1024, 64, causal=False) for n in keys]
        assert most_splits(tiles) == max(chosen), tiles


@pytest.mark.parametrize("tokens", [64, 1024, 8192])
def test_the_backend_asks_for_these_splits(tokens: int) -> None:
    with served("mla") as (at_work, _):
        at_work.peak(extend(a=700))
        at_work.peak(extend(a=700))
        fa3: Any = at_work.rank.backend.backend
        layer, inner = at_work.rank.layer, fa3._inner
        plan = fa3.extend_plan()
        fa3._prefix = replace(plan, max_seqlen_q=tokens)
        q = torch.zeros(tokens, 8, 576, dtype=torch.bfloat16)
        fa3.extend_paged_prefix(q, layer, None)
    heads = Fa3Heads(8, 1, 576, 512)
    asked = prefix_splits(heads, tokens, tokens)
    assert inner.splits[-1] == (asked or own_choice(heads, tokens, 350))
    # The plan of some requests counts, not that of the whole batch.
    assert fa3._splits(q, tokens, 1, 512) == asked
    with mock.patch.object(fa3, "_splits", wraps=fa3._splits) as splits:
        fa3.extend_paged_prefix(q, layer, None)
    assert splits.call_args.args[1] == tokens


SHARDS = [(2, torch.bfloat16), (4, torch.bfloat16), (2, FP8)]


@pytest.mark.parametrize("dcp_size, stored", SHARDS, ids=str)
def test_gathered_latents_take_what_is_told(dcp_size: int, stored: Any) -> None:
    """One request of 4096 positions and one of 1000."""
    from sglang_dcp.layers.local_batch import Shard

    lens = torch.tensor([4096, 1000])
    positions = int(lens.sum())
    table = torch.arange(2 * 4096).view(2, 4096)
    shard = Shard(table, table[:, :0], dcp_size, 0, 1)
    pool = torch.zeros(2 * 4096, 1, 576).to(stored)
    silent: Any = SilentGroup(dcp_size)
    exchange = create_exchange("a2a", silent)
    form = EXPANDED._replace(positions=positions)
    sizes = LITE._replace(dcp_size=dcp_size, stored_itemsize=stored.itemsize)
    rows = torch.arange(2)
    with LiveBytes() as planning:
        plan = plan_gather(shard, rows, torch.zeros_like(lens), lens)
    with LiveBytes() as gathering:
        parts = gather_latents(plan, pool, 512, exchange)
        cast = [part.to(torch.bfloat16) for part in parts]
    assert len(cast) == 2
    assert planning.peak <= plan_bytes(sizes, form)
    told = gather_bytes(sizes, form)
    assert 0.8 * told <= gathering.peak <= told


@pytest.fixture
def silent_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's merge of prefix chunks allocates nothing."""
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

    def merge(*args: Any) -> None:
        return None

    if in_range(sglang_version(), None, "0.5.23"):
        monkeypatch.setattr(forward_mha, "merge_state_v2", merge, raising=False)
    else:
        from sglang.srt.layers.attention import merge_state

        monkeypatch.setattr(merge_state, "merge_state_triton", merge)


class Expanded(NamedTuple):
    """Bytes at the peak of an expanded prefill, and the splits of its calls."""

    peak: int
    calls: list[tuple[bool, int | None]]


def expanded(
    prefill: Prefill,
    prefix: dict[str, int],
    new: dict[str, int],
    *,
    splits: bool = False,
    stays: Sequence[bool] = (),
) -> Expanded:
    """Let rank 0 of a group prefill requests of `new` tokens behind `prefix`."""
    with mla_expanded.surroundings(prefill), allocating_kernels():
        group = mla_expanded.Group(prefill, allocating_backend)
        rank, module = group.ranks[0], group.modules[0]
        silent: Any = SilentGroup(prefill.dcp_size)
        exchange: Any = create_exchange("a2a", silent)
        rank.backend.exchange = rank.backend.prefill._exchange = exchange
        inner: Any = rank.backend.backend._inner  # type: ignore[attr-defined]
        inner.num_splits = 0 if splits else 1
        for name, count in prefix.items():
            group.served.grow(name, count)
        grown = {name: group.served.grow(name, count) for name, count in new.items()}
        group.table.copy_(group.served.table)
        batch = group._batch(group.served.batch("EXTEND", grown))
        rows = zip(
            *([p[list(at)] for p in group.truth.of(r)] for r, at in grown.items())
        )
        q, latent, rope = (torch.cat(part).to(prefill.dtype) for part in rows)
        with LiveBytes() as live:
            group._forward(rank, module, q, latent, rope, batch, stays)
    # Local queries, and the copies by which the test feeds the module.
    local_heads = prefill.sizes.heads // prefill.dcp_size
    fed = sum(new.values()) * (local_heads * 192 + 512 + 576) * 2
    return Expanded(live.peak - fed, inner.ragged_splits)


@pytest.mark.parametrize("capacity", [1 << 17, 700])
def test_an_expanded_prefill_takes_what_is_told(
    capacity: int, silent_merge: None
) -> None:
    """SGLang's own code expands and merges, in one shot or in prefix chunks."""
    prefill = Prefill("fa3", DEEPSEEK, device="cpu", capacity=capacity)
    new, prefix = 500, 900
    at_work = expanded(prefill, {"a": prefix}, {"a": new})
    form = EXPANDED._replace(positions=min(capacity, prefix + new))
    told = total(expanded_parts(LITE._replace(expansion=form, splits=False), new))
    chunks = {(False, 1)} if capacity < prefix + new else set()
    assert set(at_work.calls) == {(True, 1)} | chunks
    assert at_work.peak <= told <= 1.7 * at_work.peak


@pytest.mark.parametrize("capacity", [1 << 17, 10_000])
def test_splits_of_an_expanded_prefix_are_told(
    capacity: int, silent_merge: None
) -> None:
    """Of many requests with few new tokens, one of them on a long prefix."""
    prefill = Prefill("fa3", DEEPSEEK, device="cpu", capacity=capacity, max_len=10_200)
    new = dict.fromkeys("abcd", 100)
    at_work = expanded(prefill, {"a": 10_000}, new, splits=True)
    heads, tokens = Fa3Heads(8, 8, 192, 128), sum(new.values())
    splits = ragged_splits(heads, tokens, 100, 10_000)
    one_shot = capacity > 11_000
    assert splits > 16 and (one_shot, splits) in at_work.calls
    form = EXPANDED._replace(positions=10_000 + tokens * one_shot)
    parts = expanded_parts(LITE._replace(expansion=form), tokens)
    assert parts[SPLITS] == splits * heads.split_bytes(tokens)
    assert at_work.peak <= total(parts) <= 1.2 * at_work.peak


def test_new_tokens_alone_are_not_split(silent_merge: None) -> None:
    """Nor are those of a prefill whose prefix is a chunk of its own."""
    prefill = Prefill("fa3", DEEPSEEK, device="cpu", capacity=1 << 17)
    assert expanded(prefill, {}, {"a": 1400}, splits=True).calls == [(True, 1)]
    cut = replace(prefill, capacity=1300, max_len=2600)
    calls = expanded(cut, {"a": 1200}, {"a": 1200}, splits=True).calls
    assert calls == [(True, 1), (False, 2)]


@pytest.mark.parametrize("dcp_size", [2, 8])
def test_a_prefill_by_group_takes_what_is_told(
    dcp_size: int, silent_merge: None
) -> None:
    """Two requests, of which one keeps its prefix in place, and no other has one."""
    prefill = Prefill("fa3", DEEPSEEK, dcp_size=dcp_size, device="cpu", max_len=3000)
    new = {"a": 1000, "b": 400}
    at_work = expanded(prefill, {"a": 900}, new, stays=[True, False])
    form = EXPANDED._replace(positions=1, in_place=1000)
    sizes = LITE._replace(
        heads=16 // dcp_size, dcp_size=dcp_size, splits=False, expansion=form
    )
    told = total(expanded_parts(sizes, sum(new.values())))
    assert at_work.peak <= told <= 1.5 * at_work.peak
    # Without the group it takes less.
    alone = sizes._replace(expansion=form._replace(in_place=0))
    assert total(expanded_parts(alone, sum(new.values()))) < told


def test_what_stays_in_place_is_less_than_what_is_expanded() -> None:
    """So that prefills by group need no more memory than others."""
    for heads, dcp, backend in itertools.product(
        (4, 16, 64), (2, 8), ("fa3", "flashinfer")
    ):
        sizes = LITE._replace(heads=heads, dcp_size=dcp, backend=backend)
        by_group = EXPANDED._replace(in_place=MOST_IN_PLACE_TOKENS)
        assert prefill_parts(sizes, 8192) == prefill_parts(
            sizes._replace(expansion=by_group), 8192
        )


def test_the_longest_prompt_takes_what_any_chunk_takes() -> None:
    """Every chunk of 8192 tokens of a prompt, up to 8 million tokens."""
    chunk, told = 8192, total(prefill_parts(LITE, 8192))
    own = MlaSizes(8, 2, 512, 64, 128, 128)
    for prefix in range(chunk, 1 << 23, 1 << 19):
        batch = PrefillBatch(Requests([chunk], [prefix]), EXPANDED.positions)
        form = choose_prefill_form(batch, own, expand_prefix=True)
        if form is PrefillForm.PREFIX_CHUNKS:
            lens = split_into_chunks([prefix], batch.capacity)[1]
            assert len(lens) <= MOST_PREFIX_CHUNKS
            # Latents, the product that expands them, and K, in bfloat16.
            numbers = int(lens.sum(1).max()) * (576 + 8 * (256 + 192))
            assert 2 * numbers <= told, prefix
        else:
            assert form is not PrefillForm.ABSORBED


@pytest.mark.parametrize("sizes", [LITE, QWEN], ids=["mla", "gqa"])
def test_splits_of_the_longest_prompt_are_told(sizes: ForwardSizes) -> None:
    heads = Fa3Heads(sizes.group_heads, sizes.kv_heads, sizes.qk_dim, sizes.v_dim)
    for tokens in (1, 64, 500, 1000, 8192):
        told = total(prefill_parts(sizes._replace(expansion=None), tokens))
        for prefix in range(1, 2_000_000, 99_999):
            splits = prefix_splits(heads, tokens, tokens)
            splits = splits or own_choice(heads, tokens, prefix)
            # Beside gathered queries and partial outputs.
            rows = tokens * sizes.group_heads
            held = rows * (sizes.qk_dim * 2 + sizes.v_dim * 2 + 4)
            split = splits * heads.split_bytes(tokens) if splits > 1 else 0
            assert held + split <= told, (tokens, prefix)


class Runner:
    """What is read of a `ModelRunner` of Qwen2.5-3B's sizes, on 2 GPUs with `fa3`."""

    def __init__(self, **changes: Any) -> None:
        from sglang.srt.configs.model_config import AttentionArch

        graph = SimpleNamespace(max_bs=changes.pop("captured", 0), backend="full")
        arguments: dict[str, Any] = dict(
            attention_backend="fa3",
            chunked_prefill_size=8192,
            cuda_graph_config=SimpleNamespace(decode=graph),
            device="cuda",
            disable_radix_cache=False,
            enable_deterministic_inference=False,
            enable_streaming_session=False,
            max_prefill_tokens=16384,
            mem_fraction_static=0.9,
            speculative_algorithm=None,
            speculative_num_draft_tokens=None,
        )
        self.server_args = SimpleNamespace(**{**arguments, **changes})
        self.model_config = SimpleNamespace(
            attention_arch=AttentionArch.MHA,
            get_total_num_kv_heads=lambda: 2,
            head_dim=128,
            hf_text_config=SimpleNamespace(dcp_kv_head_scale=2),
            num_attention_heads=16,
            v_head_dim=128,
        )
        self.attn_backend = SimpleNamespace(
            exchange=SimpleNamespace(standing_bytes=5),
            backend=SimpleNamespace(planned_outputs=(0, 0), head_tile=None),
        )
        self.device, self.dtype = "cuda", torch.bfloat16
        self.pre_model_load_memory = 100.0
        self.req_to_token_pool = SimpleNamespace(size=64)
        self.token_to_kv_pool = SimpleNamespace(dtype=torch.bfloat16)


CONFIG = DcpConfig(Layout(2, 1), "a2a")


@contextmanager
def started(free: int | None, rank: int = 0) -> Iterator[None]:
    """A rank of a server with so many free bytes on its GPU."""
    set_context(DcpContext(CONFIG, rank))

    def resolved(args: Any) -> Any:
        return args

    with (
        mock.patch.object(type(sglang_api()), "resolved", staticmethod(resolved)),
        mock.patch.object(memory_report, "free_bytes", lambda runner: free),
        mock.patch.object(memory_report, "least_free_bytes", lambda runner: free),
    ):
        yield


def admitted(runner: Any, longest: int = 1 << 20) -> int:
    return admit_prompts(runner, CONFIG, longest)


def test_free_memory_is_of_this_gpu_or_the_least_of_all() -> None:
    runner = SimpleNamespace(device="cuda", gpu_id=3)
    group = SimpleNamespace(cpu_group="of the world")
    common, state = "sglang.srt.utils.common", "sglang.srt.distributed.parallel_state"
    with (
        mock.patch(
            f"{common}.get_available_gpu_memory", autospec=True, return_value=1.5
        ) as ask,
        mock.patch(f"{state}.get_world_group", autospec=True, return_value=group),
    ):
        assert memory_report.free_bytes(runner) == 3 << 29
        ask.assert_called_once_with("cuda", 3)
        assert memory_report.least_free_bytes(runner) == 3 << 29
        ask.assert_called_with("cuda", 3, distributed=True, cpu_group="of the world")
        runner.device = "cpu"
        assert memory_report.free_bytes(runner) is None
        assert memory_report.least_free_bytes(runner) is None
        assert ask.call_count == 2


def test_sizes_are_those_of_the_runner() -> None:
    with started(None):
        runner = Runner(enable_deterministic_inference=True)
        runner.token_to_kv_pool.dtype = FP8
        with mock.patch.object(kv_form, "SERVED", frozenset()):
            assert forward_sizes(Runner(), CONFIG) == QWEN
            changed = forward_sizes(runner, replace(CONFIG, replicate_q_proj=True))
        with mock.patch.object(kv_form, "SERVED_SINCE", "0.5.16"):
            gathers = forward_sizes(Runner(), CONFIG)
            quantized = forward_sizes(runner, CONFIG)
    wanted = QWEN._replace(stored_itemsize=1, splits=False, replicated_q=True)
    assert changed == wanted
    assert gathers == QWEN._replace(gathered=MOST_GATHERED_BYTES // 512)
    assert quantized.gathered == 0


def test_the_number_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sglang_dcp")
    runners = [Runner(captured=32), Runner(captured=32)]
    for rank, runner in enumerate(runners):
        with started(10**11, rank):
            assert admitted(runner) == 1 << 20
        context.clear_context()
    [line] = caplog.messages
    prefill, decode_step = prefill_parts(QWEN_SERVED, 8192), decode_parts(
        QWEN_SERVED, 32
    )
    number = total(prefill) + total(decode_step) + 5
    assert [r.dcp_forward_memory for r in runners] == [number, number]  # type: ignore
    assert f"{number / 1e9:.2f} GB" in line and "prefill of 8192 tokens" in line
    assert f"captured decode steps {total(decode_step) / 1e9:.2f}" in line


def test_too_little_memory_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    needed = total(prefill_parts(QWEN_SERVED, 8192))
    with started(needed):
        admitted(Runner())
    assert not caplog.messages
    with started(needed - 100 * 2**20):
        assert admitted(Runner()) == 1 << 20
    [line] = caplog.messages
    # Nearly a thousandth of 100 GB.
    assert "--mem-fraction-static 0.899 at most (it is 0.900)" in line


def test_without_chunks_a_prompt_must_fit_into_what_is_left() -> None:
    free = total(prefill_parts(QWEN_SERVED, 200_000))
    runner = Runner(chunked_prefill_size=-1)
    with started(free):
        assert admitted(runner) == 200_000
        assert admitted(runner, 1000) == 1000
    with started(None):
        assert admitted(runner) == 1 << 20
    with started(free):
        assert admitted(Runner()) == 1 << 20


@pytest.mark.parametrize(
    "changes, has_prefix",
    [
        ({"chunked_prefill_size": 8192}, True),
        ({"chunked_prefill_size": 0}, False),
        ({"disable_radix_cache": False}, True),
        ({"enable_streaming_session": True}, True),
        ({}, False),
    ],
    ids=str,
)
def test_without_chunks_and_cache_no_prefix_is_counted(
    changes: dict[str, Any], has_prefix: bool
) -> None:
    whole = {"chunked_prefill_size": -1, "disable_radix_cache": True}
    runner = Runner(**{**whole, **changes})
    with started(None):
        sizes = forward_sizes(runner, CONFIG)
    assert sizes == QWEN_SERVED._replace(has_prefix=has_prefix)
    new, over_prefix = (
        total(prefill_parts(QWEN_SERVED._replace(has_prefix=has), 5000))
        for has in (False, True)
    )
    assert 0 < new < over_prefix


def test_the_longest_that_fits_is_the_longest() -> None:
    for sizes in (QWEN, LITE, LITE._replace(expansion=None)):
        for tokens in (1, 77, 5000):
            free = total(prefill_parts(sizes, tokens))
            found = longest_that_fits(sizes, 9000, free)
            assert found >= tokens
            assert total(prefill_parts(sizes, found)) <= free
            assert total(prefill_parts(sizes, found + 1)) > free
        assert longest_that_fits(sizes, 9000, 0) == 0


def test_a_lower_fraction_has_three_digits() -> None:
    assert fraction_that_fits(0.9, 0.1) == 0.8
    assert fraction_that_fits(0.9, 0.1001) == 0.799
    assert fraction_that_fits(0.1, 0.2) == 0.0


@pytest.mark.parametrize("kind", ["llama-2kv", "mla-dense"])
def test_sglangs_own_config_and_arguments_have_what_is_read(
    kind: str, tmp_path: Any, server_args: Any
) -> None:
    path = str(make_tiny_model(tmp_path / kind, kind))
    args = server_args(model_path=path, tp_size=2, dcp_size=2)
    runner = Runner()
    runner.server_args = args
    runner.model_config = ModelConfig.from_server_args(args)
    sizes = forward_sizes(runner, args.dcp)
    set_context(DcpContext(args.dcp, 0))
    runner.device = "cpu"
    assert admit_prompts(runner, args.dcp, 300) == 300
    model = runner.model_config
    assert sizes.group_heads == model.num_attention_heads
    if kind == "mla-dense":
        assert (sizes.qk_dim, sizes.kv_heads) == (sizes.v_dim + 64, 1) or sizes.latent
    else:
        assert (sizes.qk_dim, sizes.kv_heads) == (model.head_dim, 2)
    for flag in ("flashinfer_mla_disable_ragged", "disable_chunked_prefix_cache"):
        assert hasattr(sglang_api().resolved(args), flag)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
