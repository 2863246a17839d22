"""DCP attention on real gloo ranks over sharded pools, against attention over all keys.

Only this file runs table, pool, backend, exchange and merge together. It finds a key that
no rank reads, that two ranks read, or that meets the wrong head. It also finds a rank that
skips a collective. Pools hold NaN where nothing may be read; each rank compares its own
heads and looks at every slot of its pool.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, Iterator, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.attention_oracle import (
    LAYERS,
    LOCAL_PAGES,
    NAN,
    FakePool,
    GarbageBackend,
    Served,
    Shape,
    SpyExchange,
    Step,
    Truth,
    decode,
    draft,
    draft_extend,
    extend,
    mixed,
    move,
    reject,
    verify,
)
from helpers.gloo_ranks import (
    Outcomes,
    Worlds,
    enter_layout,
    fault_of,
    fork_worlds,
    leave_layout,
)
from helpers.prefill_graph import (
    HAS_PREFILL_GRAPHS,
    padded,
    replay,
    static_batch,
)
from sglang_dcp.config import DcpConfig
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.decode_rows import as_prefill_rows
from sglang_dcp.layers.prefix.kv_form import KvForm

COMMS = ("ag_rs", "a2a")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

# Query and K/V heads of the model by (tp, attn_tp).
SHAPES = {
    (2, 1): {
        "own-heads-share-one-kv-head": Shape(8, 2),
        "own-heads-span-kv-heads": Shape(8, 4),
        "uneven-12-3": Shape(12, 3),
        "uneven-6-3": Shape(6, 3),
        "mha": Shape(4, 4, 16, 16),
        "mla": Shape(4, 1, 80, 64, latent=True),
        "mla-in-parts": Shape(4, 1, 80, 64, True, True),
    },
    (3, 1): {
        "own-heads-share-one-kv-head": Shape(12, 1),
        "own-heads-span-kv-heads": Shape(12, 6),
        "uneven-6-2": Shape(6, 2),
        "mla": Shape(6, 1, 80, 64, latent=True),
        "mla-in-parts": Shape(6, 1, 80, 64, True, True),
    },
    (4, 1): {
        "own-heads-share-one-kv-head": Shape(8, 2),
        "own-heads-span-kv-heads": Shape(16, 8),
        "uneven-12-3": Shape(12, 3),
        "mla": Shape(8, 1, 80, 64, latent=True),
        "mla-in-parts": Shape(8, 1, 80, 64, True, True),
    },
    (4, 2): {
        "own-heads-share-one-kv-head": Shape(8, 2),
        "own-heads-span-kv-heads": Shape(16, 8),
        "uneven-12-6": Shape(12, 6),
        "kv-head-replicated": Shape(8, 1),
        "mla": Shape(8, 1, 80, 64, latent=True),
        "mla-in-parts": Shape(8, 1, 80, 64, True, True),
    },
}
WORLDS = (2, 3, 4)
DRAFTS = 3
DECODES = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")

SCRIPTS = {
    "extend-no-prefix": [extend(a=1, b=7, c=12, d=16, e=33)],
    # Prefix 1 leaves all ranks but one without a key; d has no prefix at all.
    "extend-prefix": [extend(a=1, b=7, c=12), mixed(a=5, d=4, b=1, c=9)],
    # Here no other rank has a key at all, and must still take part.
    "prefix-1-alone": [extend(a=1), extend(a=6), extend(b=1), mixed(b=1)],
    "chunks-then-decode": [
        extend(a=16),
        extend(a=16, b=3),
        mixed(a=5, b=16),
        decode("ab"),
        decode("ba"),
    ],
    # e was never extended: length 1.
    "decode-ragged": [extend(a=1, b=6, c=12, d=19), decode("eabcd"), decode("de")],
    "decode-batch-1": [decode("a")] * 6,
    # The scheduler replaces a row's slots by those of the radix tree.
    "rows-moved": [
        extend(a=9, b=14),
        decode("ab"),
        move("b"),
        decode("ab"),
        move("ab"),
        extend(a=3, b=2),
    ],
}
# Drafts of a chain, then what of them is accepted: lengths around every border of ranks
# and pages, and ranks without a key for the first rows. What is rejected becomes NaN.
SPECULATION = {
    "verify": [
        extend(a=1, b=7, c=12),
        verify("abc", 4),
        reject(a=3, b=0, c=2),
        verify("cab", 4),
        reject(c=3, a=1, b=3),
        move("b"),
        verify("b", 1),
        verify("ba", 7),
        decode("ab"),
    ],
    # The first token of a request is never a draft, but one rank alone may hold it.
    "draft": [
        extend(a=1, b=6, c=12),
        draft("abc", 3),
        reject(a=3, b=3, c=3),
        draft_extend("abc", 4),
        reject(a=2, b=0, c=3),
        draft("ca", 3),
        reject(c=3, a=3),
        draft_extend("ca", 4),
    ],
}
LIFE = [
    extend(a=1, b=7, c=13),
    mixed(b=1, d=5, a=4, c=8),
    decode("ebdca"),
    move("c"),
    mixed(c=6, e=3),
    decode("cea"),
]


# Tokens of a captured prefill. No batch above is larger.
BUCKET = 96

# Whether a prefill gathers K and V of its prefix, by the lengths of its prefixes.
GATHERS = {
    "in-place": lambda prefix: False,
    "rows": lambda prefix: False,
    "gathered": any,
    # Forms that follow each other in one server.
    "in-turn": lambda prefix: sum(prefix) % 3 == 1,
}


class Case(NamedTuple):
    """`garbage` is the LSE that a kernel returns, with NaN outputs, for no keys.

    With `in_graph`, prefills run as SGLang replays them from a breakable graph. `form` is
    an entry of `GATHERS`, which takes the place of the rule. With `rows`, prefills are
    decode steps.
    """

    shape: Shape
    steps: list[Step]
    comm: str
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    replicated_q: bool = False
    garbage: float | None = None
    in_graph: bool = False
    form: str = "in-place"


def cases_of(tp_size: int, attn_tp_size: int) -> dict[str, Case]:
    shapes = SHAPES[tp_size, attn_tp_size]
    plain = shapes["own-heads-span-kv-heads"]
    named: dict[str, Case] = {}
    for comm in COMMS:
        for (name, steps), page in itertools.product(SCRIPTS.items(), (1, 4)):
            named[f"{name}-page{page}-{comm}"] = Case(plain, steps, comm, page)
        for name, shape in shapes.items():
            named[f"{name}-{comm}"] = Case(shape, LIFE, comm)
            wide = Case(shape, LIFE, comm, replicated_q=True)
            named[f"{name}-replicated-q-{comm}"] = wide
        for lse in (NAN, 0.0, float("inf")):
            named[f"garbage-lse-{lse}-{comm}"] = Case(plain, LIFE, comm, garbage=lse)
        named[f"bf16-{comm}"] = Case(plain, LIFE, comm, dtype=torch.bfloat16)
        for (name, steps), page in itertools.product(SPECULATION.items(), (1, 4)):
            named[f"{name}-page{page}-{comm}"] = Case(plain, steps, comm, page)
        for name, steps in SPECULATION.items():
            wide = Case(plain, steps, comm, replicated_q=True, garbage=NAN)
            named[f"{name}-replicated-q-garbage-{comm}"] = wide
            latent = Case(shapes["mla-in-parts"], steps, comm)
            named[f"{name}-mla-in-parts-{comm}"] = latent
        named |= cases_that_gather(shapes, comm)
        named |= cases_of_form("rows", shapes, comm)
        if HAS_PREFILL_GRAPHS:
            named |= cases_in_graphs(shapes, comm)
    return {f"tp{tp_size}-attn{attn_tp_size}-{k}": v for k, v in named.items()}


def cases_that_gather(shapes: dict[str, Shape], comm: str) -> dict[str, Case]:
    """K/V heads only. The exchange is that of both forms, so one matrix is enough."""
    plain = shapes["own-heads-span-kv-heads"]
    named = {
        f"in-turn-{name}-{comm}": Case(plain, steps, comm, form="in-turn")
        for name, steps in SCRIPTS.items()
    }
    if comm != "a2a":
        return named
    for name, shape in shapes.items():
        if not shape.latent:
            named[f"gathered-{name}-{comm}"] = Case(shape, LIFE, comm, form="gathered")
    for name, steps in SPECULATION.items():
        named[f"gathered-{name}-{comm}"] = Case(plain, steps, comm, form="gathered")
    return named | cases_of_form("gathered", shapes, comm)


def cases_of_form(form: str, shapes: dict[str, Shape], comm: str) -> dict[str, Case]:
    """What a form of a prefill must get right by itself. Latents are not gathered here."""
    plain = shapes["own-heads-span-kv-heads"]
    named = {
        f"{name}-page{page}": Case(plain, steps, comm, page)
        for (name, steps), page in itertools.product(SCRIPTS.items(), (1, 4))
    }
    for name, shape in shapes.items():
        if not shape.latent or form == "rows":
            named[f"{name}-replicated-q"] = Case(shape, LIFE, comm, replicated_q=True)
    for lse in (NAN, 0.0, float("inf")):
        named[f"garbage-lse-{lse}"] = Case(plain, LIFE, comm, garbage=lse)
    named["bf16"] = Case(plain, LIFE, comm, dtype=torch.bfloat16)
    return {f"{form}-{k}-{comm}": v._replace(form=form) for k, v in named.items()}


def cases_in_graphs(shapes: dict[str, Shape], comm: str) -> dict[str, Case]:
    """K/V heads only: MLA prefills eagerly."""
    named = {
        f"in-graph-{name}-{comm}": Case(shape, LIFE, comm, in_graph=True)
        for name, shape in shapes.items()
        if not shape.latent
    }
    plain = shapes["own-heads-span-kv-heads"]
    for name, page in itertools.product(("extend-no-prefix", "extend-prefix"), (1, 4)):
        named[f"in-graph-{name}-page{page}-{comm}"] = Case(
            plain, SCRIPTS[name], comm, page, in_graph=True
        )
    named[f"in-graph-replicated-q-garbage-{comm}"] = Case(
        plain, LIFE, comm, replicated_q=True, garbage=NAN, in_graph=True
    )
    for name in ("own-heads-span-kv-heads", next(n for n in shapes if "uneven" in n)):
        named[f"in-graph-gathered-{name}-{comm}"] = Case(
            shapes[name], LIFE, comm, in_graph=True, form="gathered"
        )
    return named


class Rank:
    """One rank serving a case; knows by hand arithmetic which heads are its own."""

    def __init__(self, case: Case, layout: Layout, tp_rank: int, group: Any) -> None:
        from sglang_dcp.context import DcpContext
        from sglang_dcp.distributed.exchange import create_exchange
        from sglang_dcp.layers.attention import DcpAttentionBackend
        from sglang_dcp.layers.backends.torch_native import TorchNativeBackend
        from sglang_dcp.layers.draft_steps import DraftSteps
        from sglang_dcp.layers.local_batch import LocalBatchBuilder
        from sglang_dcp.layers.prefix.kv_form import KvSizes

        self.case, self.dcp = case, layout.tp_size // layout.attn_tp_size
        self.dcp_rank, shard = tp_rank % self.dcp, tp_rank // self.dcp
        own = case.shape.q_heads // layout.tp_size
        width = max(1, case.shape.kv_heads // layout.attn_tp_size)
        first = shard * case.shape.kv_heads // layout.attn_tp_size
        self.own = slice(tp_rank * own, (tp_rank + 1) * own)
        self.shard = slice(shard * own * self.dcp, (shard + 1) * own * self.dcp)
        self.kv = slice(first, first + width)
        self.truth = Truth(case.shape, case.dtype)
        self.served = Served(case.page_size, self.dcp)
        slots = LOCAL_PAGES * case.page_size
        self.pool = FakePool(
            case.shape, width, slots, self.served.page_size, case.dtype
        )
        views = LocalBatchBuilder(
            self.served.table, self.dcp, self.dcp_rank, self.served.page_size
        )
        self.spy = SpyExchange(create_exchange(case.comm, group))
        config = DcpConfig(layout, case.comm, case.replicated_q, case.page_size)
        dims = case.shape.qk_dim, case.shape.v_dim, case.dtype.itemsize
        sizes = None if case.shape.latent else KvSizes(own, width, self.dcp, *dims)

        def make_backend(batches: Any, width: int = 1) -> DcpAttentionBackend:
            backend: Any = TorchNativeBackend(views.local_table, self.pool)
            if case.garbage is not None:
                backend = GarbageBackend(backend, case.garbage)
            return DcpAttentionBackend(
                backend,
                batches,
                self.spy,  # type: ignore[arg-type]
                DcpContext(config, tp_rank),
                None,
                self.pool,
                self.spy if case.replicated_q else None,  # type: ignore[arg-type]
                sizes,
                width,
            )

        # A server has one width. Here they share table and pool.
        self.backends = {
            width: make_backend(views.sibling(), width) for width in range(1, 8)
        }
        self.draft = DraftSteps([make_backend(views.sibling()) for _ in range(DRAFTS)])
        self.layers = [self._layer(own, width, i) for i in range(LAYERS)]
        if case.in_graph:
            for layer in self.layers:
                layer._eager_attention = self._noted(layer._eager_attention)

    def _layer(self, own: int, width: int, layer_id: int) -> Any:
        from sglang.srt.layers.radix_attention import RadixAttention

        dim = self.case.shape.qk_dim
        v_dim = self.case.shape.v_dim
        return RadixAttention(own, dim, dim**-0.5, width, layer_id, v_head_dim=v_dim)

    def _noted(self, eager_attention: Any) -> Any:
        """The break between two segments, noted among the calls of the exchange."""

        def run(*args: Any, **kwargs: Any) -> None:
            self.spy.calls.append("break")
            eager_attention(*args, **kwargs)

        return run

    def run(self, step: Step) -> Iterator[tuple[str, Any, Any]]:
        """One forward of all layers; what came out beside what should have."""
        if step.mode == "MOVE":
            for name in step.tokens:
                before = self.served.local_slots(name, self.dcp_rank).values()
                self.served.relocate(name)
                after = self.served.local_slots(name, self.dcp_rank).values()
                self.pool.move(list(before), list(after))
            return
        if step.mode == "REJECT":
            for name, count in step.tokens.items():
                before = self.served.local_slots(name, self.dcp_rank).values()
                self.served.shrink(name, count)
                after = self.served.local_slots(name, self.dcp_rank).values()
                self.pool.forget(list({*before} - {*after}))
            return
        new = {name: self.served.grow(name, n) for name, n in step.tokens.items()}
        batch = self.served.batch(step.mode, new)
        self.spy.calls.clear()
        if step.mode == "DRAFT":
            self.draft.init_forward_metadata(batch)
            for number, backend in enumerate(self.draft.attn_backends):
                one = {
                    n: range(w.start + number, w.start + number + 1)
                    for n, w in new.items()
                }
                yield from self._layers_over(backend, one, batch, decodes=True)
        else:
            width = getattr(batch.spec_info, "num_tokens_per_req", 1)
            backend = self.backends[width]
            decodes = self._decodes(step.mode)
            if decodes and step.mode not in DECODES:
                batch = as_prefill_rows(batch)
            backend.init_forward_metadata(batch)
            yield from self._layers_over(backend, new, batch, decodes=decodes)
        yield "calls", self.spy.calls.copy(), self._calls(step.mode, new)

    def _decodes(self, mode: str) -> bool:
        """Whether a forward is a decode step, for which Q may be replicated."""
        return mode in DECODES or self.case.form == "rows"

    def _layers_over(
        self, backend: Any, new: dict[str, range], batch: Any, *, decodes: bool
    ) -> Iterator[tuple[str, Any, Any]]:
        wide = self.case.replicated_q and decodes
        for layer in self.layers:
            q, k, v = self._inputs(
                new, layer.layer_id, self.shard if wide else self.own
            )
            if self.case.in_graph and not decodes:
                out = self._replayed(backend, q, k, v, layer, batch)
            else:
                out = self._forward(backend, q, k, v, layer, batch)
            wanted = torch.cat(
                [
                    self.truth.attention(name, layer.layer_id, where)[:, self.own]
                    for name, where in new.items()
                ]
            )
            yield "attention", out, wanted.flatten(1).to(out.dtype)

    def _forward(
        self, backend: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any
    ) -> Tensor:
        if not self.case.shape.in_parts:
            return backend.forward(q, k, v, *rest)
        sizes = self.case.shape.v_dim, self.case.shape.qk_dim - self.case.shape.v_dim
        q, q_rope = q.view(len(q), -1, sum(sizes)).split(sizes, dim=-1)
        k, k_rope = k.view(len(k), -1, sum(sizes)).split(sizes, dim=-1)
        return backend.forward(q, k, k, *rest, q_rope=q_rope, k_rope=k_rope)

    def _replayed(
        self, backend: Any, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any
    ) -> Tensor:
        """The real rows of a replay, if all others are 0, else rows of NaN."""
        static = static_batch(batch, BUCKET)
        with replay(backend, static):
            out = layer(*(padded(part, BUCKET) for part in (q, k, v)), static)
        assert out.shape[0] == BUCKET
        return out[: len(q)] + (NAN if out[len(q) :].any() else 0.0)

    def _inputs(self, new: dict[str, range], layer: int, heads: slice) -> list[Tensor]:
        rows: tuple[list[Tensor], ...] = ([], [], [])
        for name, where in new.items():
            truth = self.truth.of(name, layer)
            for part, all_heads, cut in zip(rows, truth, (heads, self.kv, self.kv)):
                part.append(all_heads[list(where), cut])
        return [torch.cat(part).to(self.case.dtype).flatten(1) for part in rows]

    def _calls(self, mode: str, new: dict[str, range]) -> list[str]:
        replicated = self.case.replicated_q
        each = ["reduce"] if replicated else ["gather", "reduce"]
        if mode == "DRAFT":
            # All steps are planned before the first one runs.
            return DRAFTS * (["replicated"] * replicated) + DRAFTS * each * LAYERS
        if self._decodes(mode):
            return ["replicated"] * replicated + each * LAYERS
        prefix = [where.start for where in new.values()]
        of_layer = ["break"] * self.case.in_graph
        chosen = ["sharded"] * replicated
        if GATHERS[self.case.form](prefix):
            # The first layer gathers for all.
            return chosen + of_layer + ["swap"] + of_layer * (LAYERS - 1)
        if any(prefix):
            of_layer += ["gather", "reduce"]
        return chosen + of_layer * LAYERS

    def pool_contents(self) -> Iterator[tuple[str, Any, Any]]:
        """Each owned position at its slot, and NaN everywhere else."""
        wanted = torch.full_like(self.pool.keys, NAN)
        for name, layer in itertools.product(self.served.rows, range(LAYERS)):
            at = self.served.local_slots(name, self.dcp_rank)
            keys = self.truth.of(name, layer)[1][list(at), self.kv]
            wanted[layer, list(at.values())] = keys.to(wanted.dtype)
        same = torch.equal(wanted.nan_to_num(9e9), self.pool.keys.nan_to_num(9e9))
        yield "pool holds owned positions, and those only", same, True


def form_of(case: Case, prefix: Sequence[int]) -> KvForm:
    return KvForm.GATHERED if GATHERS[case.form](prefix) else KvForm.IN_PLACE


def check_case(case: Case, layout: Layout, tp_rank: int, group: Any) -> None:
    rank = Rank(case, layout, tp_rank, group)
    rule = mock.patch(
        "sglang_dcp.layers.kv_prefill.choose_kv_form",
        lambda requests, sizes: form_of(case, requests.prefix),
    )
    # All communication before the first assertion: a failing rank must not leave.
    with rule:
        seen = [
            (f"step {number}, {what}", got, wanted)
            for number, step in enumerate(case.steps)
            for found in (rank.run(step), rank.pool_contents())
            for what, got, wanted in found
        ]
    tol = TOLERANCE[case.dtype]
    for what, got, wanted in seen:
        if isinstance(got, Tensor):
            assert got.dtype == case.dtype, what
            torch.testing.assert_close(
                got, wanted, rtol=tol, atol=tol, msg=lambda m: f"{what}: {m}"
            )
        else:
            assert got == wanted, what


def rank_body(rank: int, world_size: int) -> Outcomes:
    for tp_size, attn_tp_size in SHAPES:
        if tp_size != world_size:
            continue
        layout = Layout(tp_size, attn_tp_size)
        group = enter_layout(DcpConfig(layout), rank)
        for name, case in cases_of(tp_size, attn_tp_size).items():
            yield name, fault_of(check_case, case, layout, rank, group)
        leave_layout()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("world_size", "name"),
    [
        pytest.param(layout[0], name, id=name)
        for layout in SHAPES
        for name in cases_of(*layout)
    ],
)
def test_equals_unsharded(world_size: int, name: str, worlds: Worlds) -> None:
    worlds.assert_passed(world_size, name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(fork_worlds(rank_body, sys.argv[2], WORLDS))
    sys.exit(pytest.main([__file__]))
