"""Set-up for machines without a GPU: core lists, slots without Triton, grammars, replicas.

Only this file compares the torch allocation, and the rows that DP attention copies, with
SGLang's Triton kernels, run by Triton's interpreter, and drives SGLang's paged allocator
through many request lives.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers.gloo_ranks import run_python
from sglang_dcp.hooks import cpu

PAGES = (2, 4, 6)
# Lengths before and after, last slots, free pages.
Batch = tuple[list[int], list[int], list[int], list[int]]
each_page = pytest.mark.parametrize("page_size", PAGES, ids=lambda n: f"page{n}")


@pytest.mark.parametrize("ranks", range(1, 7), ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12], ids=lambda n: f"{n}-cores")
def test_cores_of_rank(count: int, ranks: int) -> None:
    cores = list(range(100, 100 + 2 * count, 2))
    lists = [cpu.cores_of_rank(cores, rank, ranks).split(",") for rank in range(ranks)]
    used = [int(core) for names in lists for core in names]
    assert all(lists) and set(used) <= set(cores)
    if count >= ranks:
        assert used == cores, "each core once, in order"
        lengths = [len(names) for names in lists]
        assert max(lengths) - min(lengths) <= 1
    else:
        assert [len(names) for names in lists] == [1] * ranks
        assert set(used) == set(cores), "no core idles while another is shared"


@pytest.mark.parametrize("ranks", [1, 3], ids=["fits-nodes", "more-than-nodes"])
def test_binding_only_where_ranks_exceed_nodes(
    ranks: int, plugins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils import numa_utils

    # A rank and the number of ranks, by the names that the release has for them.
    names = inspect.signature(numa_utils.init_threads_binding).parameters
    sizes = dict(zip(names, (0, ranks), strict=True))
    name = "SGLANG_CPU_OMP_THREADS_BIND"
    monkeypatch.setattr(numa_utils, "get_cpu_ids_by_node", lambda: ["0,1", "2,3"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})
    monkeypatch.setenv(name, "mine")
    cpu.init_threads_binding(**sizes)
    assert os.environ[name] == "mine", "the user's own list stays"
    monkeypatch.delenv(name)
    cpu.init_threads_binding(**sizes)
    assert os.environ.pop(name, None) == (None if ranks == 1 else "4|5|6")


def batches(page_size: int, seed: int, count: int) -> Iterator[Batch]:
    """Random batches: lengths before and after, last slot, free pages in any order."""
    draw = random.Random(seed)
    for _ in range(count):
        before = [draw.randrange(0, 3 * page_size) for _ in range(draw.randrange(1, 6))]
        after = [n + draw.randrange(1, 3 * page_size + 2) for n in before]
        pages = draw.sample(range(50, 99), 40)
        last = [
            (1 + i) * page_size + (n - 1) % page_size if n else -1
            for i, n in enumerate(before)
        ]
        yield before, after, last, pages


def slots_by_hand(
    before: list[int], after: list[int], last: list[int], pages: list[int], size: int
) -> list[int]:
    """Position by position: a new page where one starts, else the next slot."""
    free, slots = iter(pages), []
    for first, end, slot in zip(before, after, last):
        for position in range(first, end):
            slot = next(free) * size if position % size == 0 else slot + 1
            slots.append(slot)
    return slots


def call_extend(kernel: Any, case: Batch, page_size: int) -> list[int]:
    before, after, last, pages = (torch.tensor(part) for part in case)
    out = torch.full((int((after - before).sum()),), -9)
    grid, upper = (len(before),), 1 << (len(before) - 1).bit_length()
    kernel[grid](before, after, last, pages, out, upper, page_size)
    return out.tolist()


def call_decode(kernel: Any, case: Batch, page_size: int) -> list[int]:
    before, _, last, pages = (torch.tensor(part) for part in case)
    out = torch.full((len(before),), -9)
    grid, upper = (len(before),), 1 << (len(before) - 1).bit_length()
    kernel[grid](before + 1, last, pages, out, upper, page_size)
    return out.tolist()


@each_page
def test_alloc_extend_by_hand(page_size: int, plugins: None) -> None:
    for case in batches(page_size, seed=1, count=60):
        got = call_extend(cpu.ALLOC_EXTEND, case, page_size)
        assert got == slots_by_hand(*case, page_size), case


@each_page
def test_alloc_decode_by_hand(page_size: int) -> None:
    for case in batches(page_size, seed=2, count=60):
        before, _, last, pages = case
        wanted = slots_by_hand(before, [n + 1 for n in before], last, pages, page_size)
        assert call_decode(cpu.ALLOC_DECODE, case, page_size) == wanted, case


def test_out_of_pages_is_left_to_the_caller(plugins: None) -> None:
    """Nothing is written, nothing is raised: SGLang counts the pages next."""
    case: Batch = ([0, 3], [4, 9], [-1, 6], [50])
    assert call_extend(cpu.ALLOC_EXTEND, case, 4) == [-9] * 10
    assert call_decode(cpu.ALLOC_DECODE, ([4, 8], [], [7, 15], [50]), 4) == [-9] * 2


def compare_with_triton() -> None:
    """In a process where Triton interprets: SGLang's kernels are never replaced here."""
    from sglang.kernels.ops.memory import allocator
    from sglang.kernels.ops.memory.memcpy_triton import memcpy_triton

    for copy in copies():
        assert torch.equal(run_copy(cpu.copy_rows, copy), run_copy(memcpy_triton, copy))
    for page_size in (2, 4):  # Triton takes powers of two only
        for case in batches(page_size, seed=3, count=8):
            pairs = (
                (call_extend, cpu.ALLOC_EXTEND, allocator.alloc_extend_kernel),
                (call_decode, cpu.ALLOC_DECODE, allocator.alloc_decode_kernel),
            )
            for call, ours, theirs in pairs:
                assert call(ours, case, page_size) == call(theirs, case, page_size)
    print("compared")


def test_equals_the_triton_kernels() -> None:
    done = run_python(__file__, "--triton", TRITON_INTERPRET="1")
    assert done.stdout.endswith("compared\n"), done.stderr[-3000:]


def copies() -> Iterator[tuple[int, int, int, int, bool]]:
    """Rows of source and target, first row, number of rows, and whose row the first is."""
    for first, rows in ((0, 0), (0, 3), (2, 4), (5, 1), (4, 0)):
        yield 4, 6 + first, first, min(rows, 4), False
        yield 6 + first, 4, first, min(rows, 4), True


def run_copy(copy: Any, case: tuple[int, int, int, int, bool]) -> torch.Tensor:
    rows_in, rows_out, first, rows, offset_src = case
    source = torch.arange(1.0, 1 + 3 * rows_in).view(rows_in, 3)
    target = torch.full((rows_out, 3), -1.0)
    copy(target, source, 0, torch.tensor(first), torch.tensor(rows), offset_src)
    return target


def test_rows_of_a_replica_by_hand() -> None:
    moved = 0
    for case in copies():
        rows_in, rows_out, first, rows, offset_src = case
        source = torch.arange(1.0, 1 + 3 * rows_in).view(rows_in, 3)
        wanted = torch.full((rows_out, 3), -1.0)
        for row in range(rows):
            there, here = (row, first + row) if offset_src else (first + row, row)
            wanted[there] = source[here]
            moved += 1
        assert torch.equal(run_copy(cpu.copy_rows, case), wanted), case
    assert moved > 10
    with pytest.raises(ValueError, match="along dimension 0, not 1"):
        cpu.copy_rows(wanted, source, 1, torch.tensor(0), torch.tensor(0), False)


@pytest.mark.parametrize("name", ["all_gather_into_tensor", "reduce_scatter_tensor"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_collectives_of_replicas_without_the_custom_op(name: str, device: str) -> None:
    called: list[tuple[str, int]] = []

    class Group:
        pass

    def note(who: str) -> Any:
        return lambda *args: called.append((who, len(args)))

    group = Group()
    setattr(group, f"_{name}", note("method"))
    rows = torch.empty(2, 5, device=device)
    getattr(cpu, name)(note("original"), group, rows, rows)
    assert called == [("method", 2) if device == "cpu" else ("original", 3)]


def test_ranks_gathered_in_a_dimension_of_their_own() -> None:
    """As SGLang gathers logits over a replica. gloo refuses such an output."""

    class Group:
        def _all_gather_into_tensor(self, output: Any, input: Any) -> None:
            assert output.shape == (3 * len(input), *input.shape[1:])
            output.copy_(torch.cat([input, input + 10, input + 20]))

    logits = torch.arange(8.0).view(2, 4)
    for output in (torch.empty(3, 2, 4), torch.empty(6, 4)):
        cpu.all_gather_into_tensor(print, Group(), output, logits)
        assert torch.equal(output.view(6, 4)[2:4], logits + 10)


def test_padding_of_an_eager_batch(plugins: None) -> None:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    backend = object.__new__(TorchNativeAttnBackend)
    assert backend.get_cuda_graph_seq_len_fill_value() == 1


class Lives:
    """Requests that come, decode and go through SGLang's allocator."""

    def __init__(self, page_size: int, pages: int) -> None:
        from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

        self.page_size, self.pages = page_size, pages
        self.allocator = PagedTokenToKVPoolAllocator(
            pages * page_size, page_size, torch.float32, "cpu", None, need_sort=False
        )
        self.slots: list[torch.Tensor] = []

    def check(self) -> None:
        """No slot is held twice, page 0 never, and what is not held is free."""
        held = torch.cat([*self.slots, torch.empty(0, dtype=torch.int64)])
        assert len(held.unique()) == len(held)
        assert not len(held) or int(held.min()) >= self.page_size
        used = sum(-(-len(slots) // self.page_size) for slots in self.slots)
        free = self.allocator.available_size()
        assert free == (self.pages - used) * self.page_size
        for slots in self.slots:
            place = torch.arange(len(slots))
            assert torch.equal(slots % self.page_size, place % self.page_size)
            same_page = (slots // self.page_size).diff() == 0
            assert torch.equal(same_page, place[1:] % self.page_size != 0)

    def extend(self, index: int, tokens: int) -> bool:
        old = self.slots[index]
        lens = torch.tensor([len(old)]), torch.tensor([len(old) + tokens])
        last = old[-1:] if len(old) else torch.tensor([-1])
        got = self.allocator.alloc_extend(
            lens[0], lens[0], lens[1], lens[1], last, tokens
        )
        if got is not None:
            self.slots[index] = torch.cat([old, got])
        return got is not None

    def decode(self) -> bool:
        lens = torch.tensor([len(slots) + 1 for slots in self.slots])
        last = torch.stack([slots[-1] for slots in self.slots])
        got = self.allocator.alloc_decode(lens, lens, last)
        if got is not None:
            self.slots = [torch.cat(p) for p in zip(self.slots, got.split(1))]
        return got is not None

    def free(self, index: int) -> None:
        self.allocator.free(self.slots.pop(index))


@each_page
def test_lives_through_the_paged_allocator(page_size: int, plugins: None) -> None:
    lives, draw, refused = Lives(page_size, 20), random.Random(page_size), 0
    for _ in range(300):
        choice = draw.choice("new chunk decode decode decode free".split())
        if choice == "new":
            lives.slots.append(torch.empty(0, dtype=torch.int64))
            if not lives.extend(-1, draw.randrange(1, 5 * page_size)):
                lives.slots.pop()
                refused += 1
        elif choice == "chunk" and lives.slots:
            index = draw.randrange(len(lives.slots))
            refused += not lives.extend(index, draw.randrange(1, 3 * page_size))
        elif choice == "decode" and lives.slots:
            refused += not lives.decode()
        elif choice == "free" and lives.slots:
            lives.free(draw.randrange(len(lives.slots)))
        lives.check()
    assert refused, "the pool was never full: use fewer pages"
    while lives.slots:
        lives.free(0)
    assert lives.allocator.available_size() == 20 * page_size


def masked_by_hand(logits: torch.Tensor, vocab_mask: torch.Tensor) -> torch.Tensor:
    """-inf where the token's bit is not set."""
    rows = [list(row) for row in logits.tolist()]
    for row, words in zip(rows, vocab_mask.tolist(), strict=True):
        for token in range(len(row)):
            if not words[token // 32] >> token % 32 & 1:
                row[token] = float("-inf")
    return torch.tensor(rows, dtype=logits.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_backend", [False, True], ids=["grammar", "backend"])
def test_grammar_masks_on_cpu(
    of_backend: bool, dtype: torch.dtype, plugins: None
) -> None:
    """SGLang's own grammar: a row that it bounds, one that it leaves free, odd words."""
    from sglang.srt.constrained import xgrammar_backend
    from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

    words = [chr(33 + i) for i in range(70)]
    compiled = GrammarCompiler(TokenizerInfo(words)).compile_regex("[a-c]{2}")
    grammar = xgrammar_backend.XGrammarGrammar(
        GrammarMatcher(compiled), len(words), compiled, None
    )
    mask = grammar.allocate_vocab_mask(len(words), 2, "cpu")
    grammar.fill_vocab_mask(mask, 1)
    wide = torch.randn(2, 99, generator=torch.Generator().manual_seed(7)).to(dtype)
    logits = wide[:, : len(words)]
    wanted = masked_by_hand(logits, mask)
    kind = xgrammar_backend.XGrammarGrammarBackend
    apply = kind.apply_vocab_mask if of_backend else grammar.apply_vocab_mask
    apply(logits=logits, vocab_mask=mask)
    assert torch.equal(logits, wanted)
    allowed = [words[i] for i in wanted[1].isfinite().nonzero().flatten()]
    assert allowed == ["a", "b", "c"]
    assert wanted[0].isfinite().all() and wide[:, len(words) :].isfinite().all()


def test_nothing_is_pinned_for_lora() -> None:
    def original(values: list[int], *, more: int) -> list[torch.Tensor]:
        pinned = torch.tensor(values, dtype=torch.int32, pin_memory=True)
        return [pinned, torch.zeros(more, pin_memory=True), pinned.clone().pin_memory()]

    got = cpu.without_pinned_memory(original, [3, 4], more=2)
    assert [part.tolist() for part in got] == [[3, 4], [0.0, 0.0], [3, 4]]
    assert got[0].dtype == torch.int32 and not any(part.is_pinned() for part in got)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--triton"]:
        compare_with_triton()
    else:
        sys.exit(pytest.main([__file__]))
