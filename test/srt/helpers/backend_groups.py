"""All ranks of a DCP group in one process, against a float64 softmax over all keys.

The ranks run one after the other: a first pass notes each one's partial result, a second
gives it the merged one. Communication is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Optional
from unittest import mock

import torch
from torch import Tensor

from helpers.attention_oracle import (
    Served,
    Step,
    Truth,
    batch_kind,
    decode,
    draft_extend,
    extend,
    mixed,
    move,
    reject,
    verify,
)
from helpers.backend_ranks import (
    FP8,
    GARBAGE,
    Case,
    Rank,
    real_backend,
    sglang_context,
    stored_rows,
)
from helpers.parallel import attention_width
from sglang_dcp.layers.decode_rows import as_prefill_rows
from sglang_dcp.layers.prefix.kv_form import KvForm

ROWS = 9
TOLERANCE = {None: 3e-2, FP8: 8e-2}
CAPTURED = 4

SCRIPT = [
    # Longer than a tile, one token alone, and (at DCP > 1) ranks without a key.
    extend(a=1, b=7, c=130, d=1025),
    mixed(a=5, d=70, b=1, e=300, c=64),
    mixed(f=1),
    decode("abcdef"),
    decode("f"),
    mixed(f=1, a=1),
    move("cd"),
    decode("fdcb"),
]
# Of captured batches of four: full, and padded with SGLang's fill value.
REPLAYS = [decode("dcfa"), decode("fa"), move("a"), decode("adf")]
# Query tokens of each request in a verification.
WIDTH = 3
# Eager verifications. What is rejected stays in the pool, far off.
VERIFICATIONS = [
    verify("fdcba", WIDTH),
    reject(f=2, d=0, c=1, b=2, a=2),
    draft_extend("abf", WIDTH),
    reject(a=2, b=1, f=0),
    mixed(e=9, a=2),
    verify("a", WIDTH),
]
# Of captured batches of four requests.
REPLAYED_VERIFICATIONS = [
    verify("dcfa", WIDTH),
    reject(d=2, c=0, f=1, a=2),
    verify("fa", WIDTH),
    reject(f=2, a=1),
    verify("adf", WIDTH),
]
# Short prefills of one request, of captured chains of four tokens: on a prefix, on none, full.
SHORT_PREFILLS = [
    extend(a=3),
    extend(g=2),
    extend(d=4),
    extend(a=1),
    extend(g=4),
]
DECODES = ("DECODE", "TARGET_VERIFY", "DRAFT_EXTEND_V2")


def merge_all(
    partials: Sequence[tuple[Tensor, Tensor]], base_on_e: bool
) -> tuple[Tensor, Tensor]:
    """Merge outputs and LSEs of ranks, in float64 and in the log base of the LSEs."""
    lses = torch.stack([lse.double() for _, lse in partials])
    exp, log = (torch.exp, torch.log) if base_on_e else (torch.exp2, torch.log2)
    total = exp(lses - lses.amax(0)).nan_to_num(0).sum(0)
    lse = lses.amax(0) + log(total)
    outs = [
        torch.where(own.isfinite()[..., None], out.double(), 0.0)
        * exp(own.double() - lse).nan_to_num(0)[..., None]
        for out, own in partials
    ]
    return sum(outs), lse  # type: ignore[return-value]


class Group:
    """A DCP group: its ranks, the requests that they serve, and the truth."""

    def __init__(
        self, case: Case, make_backend: Callable[[Case, Any], Any] = real_backend
    ) -> None:
        self.case, max_len = case, case.max_len
        pages = 3 + sum(
            -(-max_len // (case.page_size * case.dcp_size)) for _ in range(ROWS)
        )
        self.served = Served(case.page_size, case.dcp_size, max_len, pages)
        stored = case.kv_dtype or case.dtype
        self.truth = Truth(case.shape, stored, max_len, case.device, case.scale or 1.0)
        self.table = self.served.table.to(case.device, copy=True)
        slots = pages * case.page_size
        self.ranks = [
            Rank(case, rank, self.table, slots, make_backend)
            for rank in range(case.dcp_size)
        ]

    def batch(self, step: Step) -> tuple[dict[str, range], Any]:
        new = {name: self.served.grow(name, n) for name, n in step.tokens.items()}
        batch = self.served.batch(step.mode, new)
        for name, value in vars(batch).items():
            if isinstance(value, Tensor) and not name.endswith("_cpu"):
                setattr(batch, name, value.to(self.case.device))
        batch.positions = torch.zeros_like(batch.out_cache_loc)
        self.table.copy_(self.served.table)
        return new, batch

    def inputs(self, new: dict[str, range]) -> list[Tensor]:
        """Q, K and V of all heads: [tokens, heads, dim]."""
        rows: tuple[list[Tensor], ...] = ([], [], [])
        for name, where in new.items():
            for part, values in zip(rows, self.truth.of(name, 0)):
                part.append(values[list(where)])
        return [torch.cat(part).to(self.case.dtype) for part in rows]

    def wanted(self, new: dict[str, range]) -> Tensor:
        """[tokens, heads, dim] float64."""
        return torch.cat(
            [self.truth.attention(name, 0, where) for name, where in new.items()]
        )

    def move(self, step: Step) -> None:
        """The scheduler gives requests other slots; their K and V go along."""
        for name in step.tokens:
            every = range(self.case.dcp_size)
            old = [list(self.served.local_slots(name, r).values()) for r in every]
            self.served.relocate(name)
            for r, (rank, before) in enumerate(zip(self.ranks, old)):
                after = list(self.served.local_slots(name, r).values())
                for buffer in stored_rows(rank.pool):
                    buffer[after] = buffer[before]
                    unused = sorted(set(before) - set(after))
                    buffer[unused] = buffer[self.case.page_size].clone()

    def reject(self, step: Step) -> None:
        for name, count in step.tokens.items():
            every = range(self.case.dcp_size)
            before = [self.served.local_slots(name, r).values() for r in every]
            self.served.shrink(name, count)
            for r, (rank, held) in enumerate(zip(self.ranks, before)):
                kept = self.served.local_slots(name, r).values()
                for buffer in stored_rows(rank.pool):
                    far = torch.full_like(buffer[:1], GARBAGE, dtype=torch.float32)
                    buffer[sorted({*held} - {*kept})] = far.to(buffer.dtype)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Of the noted partial results, in float64 and the backend's log base."""
        e = self.ranks[0].backend.backend.is_lse_base_on_e
        return merge_all([rank.exchange.partial for rank in self.ranks], e)

    def check(self, got: Tensor, new: dict[str, range], where: str) -> None:
        tolerance = TOLERANCE[self.case.kv_dtype]
        torch.testing.assert_close(
            got.double(),
            self.wanted(new),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text: f"{where}: {text}",
        )

    def eager(self, step: Step, where: str) -> None:
        new, batch = self.batch(step)
        q, k, v = self.inputs(new)
        outs = self._extend(q, k, v, batch)
        if step.mode in DECODES:
            if self.case.width == 1:
                outs = [self.merged()[0]]
            else:
                self.answer_merged(q.dtype)
                outs = self._extend(q, k, v, batch)
                self.forget_merged()
            self.check(torch.cat(outs, 1), new, where)
            return
        if self.case.gathers and any(batch.extend_prefix_lens_cpu):
            self._deliver()
            outs = self._extend(q, k, v, batch)
        elif any(batch.extend_prefix_lens_cpu):
            self.answer_merged(q.dtype)
            outs = self._extend(q, k, v, batch)
        self.forget_merged()
        self.check(torch.cat(outs, 1), new, where)

    def answer_merged(self, dtype: torch.dtype) -> None:
        """Each rank's exchange answers with what the last run's partial results give."""
        out, lse = self.merged()
        for rank in self.ranks:
            own = out[:, rank.own].to(dtype), lse[:, rank.own].float()
            rank.exchange.merged = own

    def forget_merged(self) -> None:
        for rank in self.ranks:
            rank.exchange.merged = rank.exchange.incoming = None

    def _deliver(self) -> None:
        """Hand each rank what its peers sent. Rank r is peer r - 1 of a rank below it."""
        every = range(len(self.ranks))
        for rank in every:
            parts = [
                self.ranks[peer].exchange.swapped[rank - (rank > peer)]  # type: ignore
                for peer in every
                if peer != rank
            ]
            self.ranks[rank].exchange.incoming = torch.stack(parts)

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, batch: Any) -> list[Tensor]:
        found = []
        for rank in self.ranks:
            rank.exchange.all_heads = q
            rank.backend.init_forward_metadata(batch)
            own = q[:, rank.own].contiguous()
            out = rank.forward(own, k.clone(), v.clone(), batch)
            found.append(out.view(*own.shape[:2], self.case.shape.v_dim))
        return found


class Graphs:
    """Captured decode of each rank: static inputs, and what the exchange was given.

    Captured verifications end with the rank's own heads, and so do steps that are one
    `chain`, a short prefill. For these the exchange answers with static tensors, which a
    second replay reads merged.
    """

    def __init__(self, group: Group, *, chain: bool = False) -> None:
        self.group, self.width, self.chain = group, group.case.width, chain
        self.rows = CAPTURED * self.width
        self.ends_with_own_heads = chain or self.width > 1
        shape, device = group.case.shape, group.case.device
        sizes = (
            (shape.q_heads, shape.qk_dim),
            (shape.kv_heads, shape.qk_dim),
            (shape.kv_heads, shape.v_dim),
        )
        self.static = [
            torch.zeros(self.rows, *size, device=device).to(group.case.dtype)
            for size in sizes
        ]
        batch = self._padded(SimpleNamespace(batch_size=0), 0)
        self._replays = []
        for rank in group.ranks:
            if self.ends_with_own_heads:
                heads = self.rows, rank.local_heads
                rank.exchange.merged = (
                    torch.zeros(*heads, shape.v_dim, device=device).to(
                        group.case.dtype
                    ),
                    torch.zeros(heads, device=device),
                )
            rank.backend.chains = rank.chains if chain else None
            rank.backend.init_cuda_graph_state(CAPTURED, self.rows)
            with self._running(rank):
                rank.backend.init_forward_metadata_out_graph(batch, in_capture=True)
                self._replays.append(self._capture(rank, batch))

    def _running(self, rank: Rank) -> AbstractContextManager[None]:
        return rank.chains.running() if self.chain else nullcontext()

    def _capture(self, rank: Rank, batch: Any) -> Callable[[], Any]:
        """A replay of one decode step: the rank's partial result, and its output."""
        self._run(rank, batch)
        if self.group.case.device == "cpu":
            return lambda: self._run(rank, batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = self._run(rank, batch)

        def replay() -> Any:
            graph.replay()
            return captured

        return replay

    def _run(self, rank: Rank, batch: Any) -> Any:
        q, k, v = self.static
        # Replicated Q: the heads of all ranks. A write with scales divides K and V.
        out = rank.forward(q, k.clone(), v.clone(), batch)
        return *rank.exchange.partial, out.view(
            self.rows, -1, self.group.case.shape.v_dim
        )

    def _padded(self, batch: Any, size: int) -> Any:
        """SGLang's padding: row 0, length 1; the slots are not padded."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        more, device = CAPTURED - size, self.group.case.device
        lens = getattr(batch, "seq_lens_cpu", torch.zeros(0, dtype=torch.int64))
        rows = getattr(batch, "req_pool_indices", lens.to(device))
        lens = torch.nn.functional.pad(lens, (0, more), value=1)
        slots = getattr(batch, "out_cache_loc", lens[:size].to(device))
        verified = dict(
            forward_mode=ForwardMode.TARGET_VERIFY,
            spec_info=SimpleNamespace(num_tokens_per_req=self.width),
        )
        mode = dict(forward_mode=ForwardMode.DECODE)
        return batch_kind()(
            **(verified if self.width > 1 else mode),
            batch_size=CAPTURED,
            req_pool_indices=torch.nn.functional.pad(rows, (0, more)),
            seq_lens=lens.to(device),
            seq_lens_cpu=lens,
            seq_lens_sum=int(lens.sum()),
            out_cache_loc=slots,
            positions=torch.zeros(self.rows, dtype=torch.int64, device=device),
        )

    def replay(self, step: Step, where: str) -> None:
        new, batch = self.group.batch(step)
        rows = len(new) * self.width
        if self.chain:
            batch = as_prefill_rows(batch)
            rows = batch.batch_size
        padded = self._padded(batch, rows // self.width)
        for static, values in zip(self.static, self.group.inputs(new)):
            static[:rows] = values
        outs = self._replayed(padded, rows)
        if not self.ends_with_own_heads:
            self.group.check(self.group.merged()[0], new, where)
            return
        for rank, merged in zip(self.group.ranks, self._merged_for(rows)):
            assert rank.exchange.merged is not None
            for known, part in zip(rank.exchange.merged, merged):
                known[:rows] = part
        outs = self._replayed(padded, rows)
        self.group.check(torch.cat(outs, 1), new, where)

    def _replayed(self, padded: Any, rows: int) -> list[Tensor]:
        """Replay each rank, and return the output of its heads."""
        outs = []
        for rank, replay in zip(self.group.ranks, self._replays):
            with self._running(rank):
                rank.backend.init_forward_metadata_out_graph(padded)
                out, lse, own = replay()
            rank.exchange.partial = out[:rows], lse[:rows]
            outs.append(own[:rows].clone())
        return outs

    def _merged_for(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        out, lse = self.group.merged()
        for rank in self.group.ranks:
            yield out[:, rank.own].to(self.group.case.dtype), lse[:, rank.own].float()


def run_steps(group: Group, steps: Sequence[Step], run: Callable[..., None]) -> None:
    """Each step by `run(step, its name)`, but the scheduler's moves by the group."""
    for number, step in enumerate(steps):
        if step.mode == "MOVE":
            group.move(step)
        elif step.mode == "REJECT":
            group.reject(step)
        else:
            run(step, f"{run.__name__} {number}")


def serve(
    case: Case,
    steps: Sequence[Step] = SCRIPT,
    replays: Optional[Sequence[Step]] = REPLAYS,
    make_backend: Callable[[Case, Any], Any] = real_backend,
    *,
    speculates: bool = False,
) -> Group:
    """A life of requests in eager forwards, then in captured decode steps.

    Nothing is captured if `replays` is None. If it `speculates`, short prefills as captured
    chains come next. Then another life follows, with verifications, eager and captured.
    """
    rule = mock.patch(
        "sglang_dcp.layers.kv_prefill.choose_kv_form",
        lambda requests, sizes: (
            KvForm.GATHERED if any(requests.prefix) else KvForm.IN_PLACE
        ),
    )
    with sglang_context(case.device, **case.arguments), rule:
        with attention_width(case.dcp_size):
            group = Group(case, make_backend)
            run_steps(group, steps, group.eager)
            if replays is not None:
                run_steps(group, replays, Graphs(group).replay)
            if speculates:
                with mock.patch("sglang_dcp.layers.chain_steps.WIDTHS", (CAPTURED,)):
                    one = Graphs(group, chain=True)
                run_steps(group, SHORT_PREFILLS, one.replay)
                run_steps(group, [decode("gadc")], group.eager)
                chains = Group(replace(case, width=WIDTH), make_backend)
                before = [step for step in steps if step.mode not in DECODES]
                run_steps(chains, before, chains.eager)
                run_steps(chains, VERIFICATIONS, chains.eager)
                graphs = Graphs(chains)
                run_steps(chains, REPLAYED_VERIFICATIONS, graphs.replay)
    return group
