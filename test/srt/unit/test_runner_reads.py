"""What SGLang's attention backends read of a runner is right on a `RunnerView`.

Only this file sees a read that a new release adds and that bypasses the view: a backend
would read logical slots, or plan for the heads of one rank, and nothing would raise.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from torch import Tensor

from helpers.attention_oracle import MAX_LEN, FakePool, Served, Shape
from helpers.backend_ranks import logical_translator
from helpers.runner_reads import (
    BACKENDS,
    LISTS,
    REGISTRY,
    Backend,
    complaint,
    judged,
    reads_of,
)
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.backends.base import cumulated
from sglang_dcp.layers.local_batch import LocalBatchBuilder
from sglang_dcp.layers.runner_view import RunnerView
from sglang_dcp.ops.query_rows import folding_of

RELEASE = version("sglang")
READS = {name: reads_of(backend) for name, backend in BACKENDS.items()}
ALL_READS = set[str]().union(*READS.values())
HAS_TRANSLATOR = "runner.kv_index_translator" in ALL_READS

PAGE, DCP, HEADS = 4, 2, 8
# More than requests, as with several query tokens of each.
ROWS = 96


@pytest.mark.parametrize("name", BACKENDS)
def test_every_read_is_judged(name: str) -> None:
    listed = judged(RELEASE).get(name, {})
    assert not (problem := complaint(name, RELEASE, READS[name], listed)), problem


def test_each_read_is_listed_once_by_a_known_word() -> None:
    data = tomllib.loads(LISTS.read_text())
    words = data.pop("words")
    for release, backends in data.items():
        assert backends.keys() == BACKENDS.keys(), release
        for name, lists in backends.items():
            assert lists.keys() <= words.keys(), (release, name)
            reads = [read for some in lists.values() for read in some]
            assert len(set(reads)) == len(reads), (release, name)


TOY_REGISTRY = """
from sglang.srt.layers.attention.other import OtherBackend

def create_toy_backend(runner):
    if runner.is_other:
        return OtherBackend(runner)
    from sglang.srt.layers.attention.toy import Toy
    runner.made = True
    return Toy(runner, more=runner.model_config.dim)
"""
TOY = """
from sglang.srt.configs import helper
from sglang.srt.runtime_context import get_parallel as parallel_of, get_schedule

class Updater:
    def __init__(self, config, backend):
        self.heads = config.get_heads(get_schedule().page_size)[0]
        self.pool = backend.pool
        self.update = self.update_one

    def update_one(self):
        self.pool.lookup(1).rows

class Toy:
    def __init__(self, model_runner, more):
        super().__init__(model_runner)
        config: object = model_runner.model_config
        self.kind = getattr(config, "kind", None)
        self.pool = model_runner.pool
        self.used = helper(config, self.pool.size) + unseen(model_runner.size)
        self.updater = Updater(config, self)
        self._later(model_runner, deep=config.deep)
        self._inherited(more, runner=model_runner)
        isinstance(model_runner.pool, Updater)
        local(model_runner)

    @staticmethod
    def _later(runner, deep):
        deep.down[runner.deepest]

    def init_forward_metadata(self, batch):
        self.updater.update()
        get_schedule().chunk

    def forward(self):
        self.pool.only_in_forward

def local(runner):
    parallel = parallel_of()
    return runner.get().anything, parallel.width
"""
TOY_READS = {
    "OtherBackend(runner)",
    "get_parallel().width",
    "get_schedule().chunk",
    "get_schedule().page_size",
    "helper(runner.model_config)",
    "runner.deepest",
    "runner.get()",
    "runner.is_other",
    "runner.made =",
    "runner.model_config",
    "runner.model_config.deep",
    "runner.model_config.deep.down",
    "runner.model_config.dim",
    "runner.model_config.get_heads()",
    "runner.model_config.kind",
    "runner.pool",
    "runner.pool.lookup()",
    "runner.pool.size",
    "runner.size",
    "self._inherited(runner)",
    "super().__init__(runner)",
}


def test_reads_are_found_behind_other_names(tmp_path: Path) -> None:
    """Through variables, attributes, parameters, `getattr` and methods bound elsewhere."""
    toy = Backend("create_toy_backend", "toy.py", "Toy")
    (tmp_path / REGISTRY).parent.mkdir(parents=True)
    (tmp_path / REGISTRY).write_text(TOY_REGISTRY)
    (tmp_path / toy.path).write_text(TOY)
    assert reads_of(toy, tmp_path) == TOY_READS


def test_a_new_read_is_named_with_what_to_do() -> None:
    found = {"runner.page_size", "runner.new"}
    said = complaint("fa3", "9.9", found, ["runner.page_size", "runner.old"])
    assert "['runner.new']" in said and "['runner.old']" in said
    assert "runner_view.py" in said and '["9.9".fa3]' in said
    assert complaint("fa3", "9.9", found, found) == ""


class Case:
    """A runner of SGLang at a decode step, and the view of one rank on it."""

    def __init__(self, rank: int) -> None:
        self.rank, self.served = rank, Served(PAGE, DCP)
        for name, size in (("a", 20), ("b", 9)):
            self.served.grow(name, size)
        new = {name: self.served.grow(name, 1) for name in self.served.rows}
        self.batch = self.served.batch("DECODE", new)
        table, config = self.served.table, DcpConfig(Layout(DCP, 1), "a2a", False, PAGE)
        builder = LocalBatchBuilder(table, DCP, rank, PAGE)
        self.runner = make_runner(table)
        self.view = RunnerView(self.runner, builder.local_table, config, ROWS)
        self.local = builder.build(self.batch).forward_batch

    @property
    def wanted(self) -> list[list[int]]:
        """Local slots of each request, by its pages."""
        served = self.served
        return [[*served.local_slots(name, self.rank).values()] for name in served.rows]


def make_runner(table: Tensor) -> Any:
    from sglang.srt.configs.model_config import ModelConfig

    pool = FakePool(Shape(HEADS, 2), 2, 8, PAGE, torch.float32)
    # Real, so that its methods are bound to an object that knows nothing of the view.
    model: Any = object.__new__(ModelConfig)
    model.hf_text_config = SimpleNamespace(num_attention_heads=HEADS)
    model.num_attention_heads, model.context_len = HEADS, MAX_LEN
    runner = SimpleNamespace(
        device="cpu",
        is_draft_worker=False,
        model_config=model,
        page_size=PAGE * DCP,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=len(table)),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
    )
    if HAS_TRANSLATOR:
        runner.kv_index_translator = logical_translator(runner)
    return runner


@pytest.fixture(autouse=True)
def own_dcp_is_off() -> Iterator[None]:
    """As with our hooks, SGLang's own `dcp_size` is 1."""
    from sglang.srt.runtime_context import get_parallel

    with get_parallel().override(attn_dcp_size=1):
        yield


def value_of(read: str, runner: Any) -> Any:
    value = runner
    for step in read.split(".")[1:]:
        value = getattr(value, step.removesuffix("()"))
        if step.endswith("()"):
            value = value()
    return value


HEADS_OF_GROUP = {
    "runner.model_config.get_max_num_attention_heads()",
    "runner.model_config.hf_text_config.num_attention_heads",
    "runner.model_config.num_attention_heads",
}


@pytest.mark.parametrize("read", sorted(HEADS_OF_GROUP & ALL_READS))
def test_heads_are_those_of_the_group(read: str) -> None:
    case = Case(0)
    assert value_of(read, case.runner) == HEADS
    assert value_of(read, case.view) == HEADS * DCP


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("tile", [None, 16])
def test_heads_of_a_verification_are_those_of_all_its_tokens(
    tile: Optional[int], latent: bool
) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    case, width = Case(0), 5
    model = case.runner.model_config
    model.attention_arch = AttentionArch.MLA if latent else AttentionArch.MHA
    # As scaled for DCP. Two heads of the checkpoint are one for each attention rank.
    model.hf_text_config.num_key_value_heads = 2 * DCP
    model.hf_text_config.dcp_kv_head_scale = DCP
    model.get_total_num_kv_heads = lambda: 2 * DCP
    config = DcpConfig(Layout(DCP, 1), "a2a", False, PAGE)
    table = case.view.req_to_token_pool.req_to_token
    view = RunnerView(case.runner, table, config, ROWS, width, tile)
    of_rank = view.model_config.num_attention_heads // DCP
    folding = folding_of(width, HEADS, 1 if latent else 2, tile)
    assert of_rank == folding.heads
    padded = tile is not None and not latent and HEADS // 2 * width > tile
    assert (of_rank == HEADS * width) is not padded


def table_slots(runner: Any, case: Case) -> list[list[int]]:
    rows = runner.req_to_token_pool.req_to_token[case.batch.req_pool_indices]
    lens = case.local.seq_lens_cpu.tolist()
    return [row[:length].tolist() for row, length in zip(rows, lens)]


def packed_slots(runner: Any, case: Case) -> list[list[int]]:
    """As SGLang's backends ask for them: by the local batch, with the logical plan."""
    batch, local = case.batch, case.local
    plan = case.runner.kv_index_translator.plan(
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=batch.seq_lens_cpu,
        write_virtual=batch.out_cache_loc,
    )
    slots = torch.full((local.seq_lens_sum,), -1, dtype=torch.int32)
    is_translated = runner.kv_index_translator.pack_read_stream(
        plan,
        req_pool_indices=local.req_pool_indices,
        seq_lens=local.seq_lens,
        indptr=cumulated(local.seq_lens),
        out=slots,
    )
    assert not is_translated
    return [part.tolist() for part in slots.split(local.seq_lens_cpu.tolist())]


SLOTS: dict[str, Callable[[Any, Case], list[list[int]]]] = {
    "runner.req_to_token_pool.req_to_token": table_slots,
    "runner.kv_index_translator.pack_read_stream()": packed_slots,
}


class GatherInTorch:
    """The kernel behind `pack_read_stream`."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.run

    def run(self, *given: Any, **how: Any) -> None:
        table, rows, lens, ends, first, out, stride = given
        assert first is None and how["ENTRY_PAGE_SIZE"] == 1
        assert how["token_mapping"] is None
        for row, length, end in zip(rows.tolist(), lens.tolist(), ends.tolist()):
            out[end : end + length] = table.view(-1)[row * stride :][:length]


@pytest.mark.parametrize("rank", range(DCP))
@pytest.mark.parametrize("read", sorted(SLOTS.keys() & ALL_READS))
def test_slots_are_those_of_the_rank(
    read: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HAS_TRANSLATOR:
        from sglang.srt.mem_cache import kv_index_translator as module

        kernel = "create_flashinfer_kv_indices_triton"
        monkeypatch.setattr(module, kernel, GatherInTorch())
    case = Case(rank)
    assert SLOTS[read](case.view, case) == case.wanted
    # The runner's own would have given something else.
    assert SLOTS[read](case.runner, case) != case.wanted


# Of what else the view replaces. Objects are there for the reads that go through them.
WANTED: dict[str, Any] = {
    "runner.page_size": PAGE,
    "runner.model_config.context_len": MAX_LEN // DCP,
    "runner.req_to_token_pool.req_to_token.stride()": (MAX_LEN // DCP, 1),
    "runner.req_to_token_pool.req_to_token.shape": (
        len(Served(1, 1).table),
        MAX_LEN // DCP,
    ),
    "runner.req_to_token_pool.size": ROWS,
    "runner.kv_index_translator.is_translating": False,
    "runner.kv_index_translator.needs_read_translate": False,
    "runner.kv_index_translator.reads_are_translated": False,
}
OBJECTS = {
    "runner.kv_index_translator",
    "runner.model_config",
    "runner.model_config.hf_text_config",
    "runner.req_to_token_pool",
}
OVERLAID = {
    read
    for reads in judged(RELEASE).values()
    for read, word in reads.items()
    if word == "overlaid"
}


@pytest.mark.parametrize("read", sorted(WANTED.keys() & OVERLAID))
def test_the_view_has_values_of_the_rank(read: str) -> None:
    assert value_of(read, Case(1).view) == WANTED[read]


@pytest.mark.parametrize("read", sorted(OBJECTS & OVERLAID))
def test_the_view_has_objects_of_its_own(read: str) -> None:
    case = Case(1)
    assert value_of(read, case.view) is not value_of(read, case.runner)


def test_no_value_is_called_overlaid_without_a_test() -> None:
    calls = {"runner.kv_index_translator.translate_dcp_read_ids()"}
    tested = calls | OBJECTS | WANTED.keys() | HEADS_OF_GROUP | SLOTS.keys()
    assert OVERLAID <= tested


def test_local_slots_are_not_divided_once_more() -> None:
    """Else SGLang's own decode context parallelism would take them for logical ones."""
    from sglang.srt.runtime_context import get_parallel

    refused = pytest.raises(RuntimeError, match="slots of a rank's pool once more")
    with get_parallel().override(attn_dcp_size=DCP):
        with refused if HAS_TRANSLATOR else nullcontext():
            Case(0)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
