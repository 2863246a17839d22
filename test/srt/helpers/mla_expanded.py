"""DeepSeek's prefill by MHA, in SGLang's own code, over our backend: all ranks of a group.

What `test_mla_prefill*.py` share. SGLang's `DeepseekMHAForwardMixin` expands latents and merges the
prefix chunks; pools, chunks, gathering and kernels are ours. The ranks run one after the
other: a first pass notes what each sends, the next one gives it what all sent. A third
follows where partial outputs of gathered queries are merged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Optional
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from helpers.attention_oracle import (
    Served,
    Shape,
    Step,
    batch_kind,
    extend,
    mixed,
    move,
)
from helpers.backend_groups import merge_all
from helpers.backend_ranks import Case, Rank, real_backend, sglang_context
from helpers.parallel import attention_width
from helpers.prefill_graph import (
    HAS_PREFILL_GRAPHS,
    padded,
    replay,
    static_batch,
)
from sglang_dcp.distributed.exchange.base import mask_empty_rows
from sglang_dcp.layers.mla import dispatch, eager_region
from sglang_dcp.layers.mla.form import PrefillForm, expanded_form
from sglang_dcp.layers.mla.groups import Groups

TOLERANCE = 3e-2
ROWS = 9
CAPACITY = "SGLANG_MAX_KV_CHUNK_CAPACITY"

SCRIPT = [
    extend(a=1, b=7, c=130, d=1025),
    # Requests without a prefix among those with one, which ranks hold in part or not at all.
    mixed(a=5, d=70, b=1, e=300, c=64),
    mixed(f=1),
    mixed(f=1, a=1),
    move("cd"),
    mixed(d=33, c=2),
]


class Sizes(NamedTuple):
    """Of MLA: `heads` of the whole model, and dims of the parts of a head."""

    heads: int
    latent: int
    rope: int
    nope: int
    v: int


DEEPSEEK = Sizes(16, 512, 64, 128, 128)


@dataclass(frozen=True)
class Prefill:
    """A case; `capacity` is how many positions a prefix chunk has at most.

    Each batch ends with `padding` tokens of no request, as DP attention has it. Requests
    that `in_place` names keep their prefix in place, in a prefill by group. With `replayed`,
    attention is an eager region of a prefill graph, whose rows are so many more.
    """

    backend: str
    sizes: Sizes = DEEPSEEK
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: Optional[torch.dtype] = None
    dcp_size: int = 2
    page_size: int = 1
    device: str = "cuda"
    max_len: int = 1500
    capacity: int = 1 << 17
    padding: int = 0
    in_place: str = ""
    replayed: int = 0

    @property
    def case(self) -> Case:
        sizes = self.sizes
        key = sizes.latent + sizes.rope
        return Case(
            self.backend,
            Shape(sizes.heads, 1, key, sizes.latent, latent=True),
            self.dtype,
            self.kv_dtype,
            dcp_size=self.dcp_size,
            page_size=self.page_size,
            device=self.device,
            max_len=self.max_len,
        )


class Rows(NamedTuple):
    """Of a request, by position: what its projections gave."""

    q: Tensor  # [positions, heads, nope + rope]
    latent: Tensor  # [positions, latent]
    rope: Tensor  # [positions, rope]


class Truth:
    """Queries and latents of every position, the weight that expands them, and attention.

    All values are those of `prefill.dtype`, in float64.
    """

    def __init__(self, prefill: Prefill) -> None:
        self._prefill = prefill
        sizes = prefill.sizes
        rows = sizes.heads * (sizes.nope + sizes.v)
        drawn = self._draw(torch.Generator().manual_seed(1), rows, sizes.latent)
        self.weight = self._round(drawn * sizes.latent**-0.5)
        self._made: dict[str, Rows] = {}

    @property
    def scaling(self) -> float:
        return float((self._prefill.sizes.nope + self._prefill.sizes.rope) ** -0.5)

    def of(self, request: str) -> Rows:
        if request not in self._made:
            gen = torch.Generator().manual_seed(ord(request))
            sizes, length = self._prefill.sizes, self._prefill.max_len
            heads = sizes.heads, sizes.nope + sizes.rope
            self._made[request] = Rows(
                2 * self._draw(gen, length, *heads),
                self._draw(gen, length, sizes.latent),
                self._draw(gen, length, sizes.rope),
            )
        return self._made[request]

    def _draw(self, gen: torch.Generator, *sizes: int) -> Tensor:
        return self._round(torch.randn(*sizes, generator=gen))

    def _round(self, values: Tensor) -> Tensor:
        return values.to(self._prefill.dtype).double().to(self._prefill.device)

    def stored(self, values: Tensor) -> Tensor:
        """As they come back from the pool."""
        return values.to(self._prefill.kv_dtype or self._prefill.dtype).double()

    def attention(self, request: str, new: range, *, read_back: bool) -> Tensor:
        """[new tokens, heads, v_dim]; new tokens as projected, or `read_back`."""
        q, *parts = (part[: new.stop] for part in self.of(request))
        stored = new.stop if read_back else new.start
        latent, rope = (
            torch.cat([self.stored(part[:stored]), part[stored:]]) for part in parts
        )
        sizes = self._prefill.sizes
        expanded = (latent @ self.weight.T).view(len(latent), sizes.heads, -1)
        k_nope, values = expanded.split([sizes.nope, sizes.v], dim=-1)
        keys = torch.cat([k_nope, rope[:, None].expand(-1, sizes.heads, -1)], -1)
        scores = torch.einsum("phd,khd->phk", q[new.start :], keys) * self.scaling
        at = torch.arange(new.stop, device=scores.device)
        later = at > at[new.start :, None]
        scores = scores.masked_fill(later[:, None], -math.inf)
        return torch.einsum("phk,khd->phd", scores.softmax(-1), values)


def deepseek(rank: Rank, prefill: Prefill, truth: Truth) -> Any:
    """SGLang's attention module as far as a prefill by MHA goes, of one rank's heads."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha

    class Attention(forward_mha.DeepseekMHAForwardMixin):  # type: ignore[misc]
        # As our hooks put them there.
        def _set_mla_kv_buffer(self, *args: Any) -> None:
            dispatch.set_mla_kv_buffer(_never, self, *args)

        def _get_mla_kv_buffer(self, *args: Any) -> Any:
            return dispatch.get_mla_kv_buffer(_never, self, *args)

    module: Any = Attention()
    sizes, heads = prefill.sizes, rank.local_heads
    module.num_local_heads, module.kv_lora_rank = heads, sizes.latent
    module.q_lora_rank = module.alt_stream = None
    module.qk_nope_head_dim, module.qk_rope_head_dim = sizes.nope, sizes.rope
    module.qk_head_dim, module.v_head_dim = sizes.nope + sizes.rope, sizes.v
    module.current_attention_backend = prefill.backend
    module.kv_cache_dtype = "auto" if prefill.kv_dtype is None else "fp8_e4m3"
    dim, scaling = module.qk_head_dim, truth.scaling
    module.attn_mha = RadixAttention(heads, dim, scaling, heads, 0, v_head_dim=sizes.v)
    dim, latent = sizes.latent + sizes.rope, sizes.latent
    module.attn_mqa = RadixAttention(heads, dim, scaling, 1, 0, v_head_dim=latent)
    weight = truth.weight.view(sizes.heads, -1, sizes.latent)[rank.own]
    weight = weight.to(prefill.dtype)
    own = weight.flatten(0, 1)
    # As SGLang's loader leaves them: K from heads to latents, V from latents to heads.
    w_kc, w_vc = weight.split([sizes.nope, sizes.v], dim=1)
    module.w_kc = w_kc.transpose(1, 2).contiguous().transpose(1, 2)
    module.w_vc = w_vc.contiguous().transpose(1, 2)

    def kv_b_proj(latent: Tensor) -> tuple[Tensor, None]:
        # Kernels of quantized weights ask for it.
        assert latent.is_contiguous()
        return latent @ own.T, None

    module.kv_b_proj, module.use_deep_gemm_bmm = kv_b_proj, False
    module.o_proj = lambda out: (out, None)
    return module


def _never(*args: Any) -> None:
    raise AssertionError("SGLang's own method, by logical slots")


class Call(NamedTuple):
    """A collective, and what a rank gave to it."""

    kind: str
    given: tuple[Tensor, ...]
    more: dict[str, Any]


class NotedExchange:
    """Notes what a rank gives to each collective, and answers once that of all is known."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self.calls: list[Call] = []
        self.answers: dict[int, Any] = {}

    def gather_heads(self, q: Tensor) -> Tensor:
        return self._note("gather_heads", (q,), q.repeat(1, self._ranks, 1))

    def gather_rows(self, rows: Tensor) -> Tensor:
        repeats = self._ranks, *[1] * (rows.dim() - 1)
        return self._note("gather_rows", (rows,), rows.repeat(*repeats))

    def reduce(self, out: Tensor, lse: Tensor, **more: Any) -> Any:
        lse = mask_empty_rows(lse, more["empty_rows"])
        heads = out.shape[1] // self._ranks
        unknown = out[:, :heads].nan_to_num(0), lse[:, :heads].nan_to_num(0)
        return self._note("reduce", (out, lse), unknown, **more)

    def _note(
        self, kind: str, given: tuple[Tensor, ...], unknown: Any, **more: Any
    ) -> Any:
        self.calls.append(Call(kind, given, more))
        return self.answers.get(len(self.calls) - 1, unknown)


def answer(exchanges: list[NotedExchange], *, reduces: bool) -> None:
    """Tell all ranks what the noted calls give: the gathers, or all calls.

    Ranks that issue other collectives, or in another order, fail here.
    """
    for number, calls in enumerate(zip(*(e.calls for e in exchanges), strict=True)):
        kinds = {(call.kind, *(part.shape for part in call.given)) for call in calls}
        assert len(kinds) == 1, f"ranks differ in collective {number}: {kinds}"
        kind, parts = calls[0].kind, [call.given for call in calls]
        if kind == "reduce" and not reduces:
            continue
        for rank, exchange in enumerate(exchanges):
            exchange.answers[number] = _answer_of(kind, parts, rank, calls[0].more)


def _answer_of(
    kind: str, parts: list[tuple[Tensor, ...]], rank: int, more: dict[str, Any]
) -> Any:
    if kind != "reduce":
        dim = 1 if kind == "gather_heads" else 0
        return torch.cat([part for (part,) in parts], dim)
    outs = [(out, lse) for out, lse in parts]
    out, lse = merge_all(outs, more["is_lse_base_on_e"])
    heads = out.shape[1] // len(parts)
    own = slice(rank * heads, (rank + 1) * heads)
    return out[:, own].to(outs[0][0].dtype), lse[:, own].float()


class Group:
    """A DCP group at work on `SCRIPT`, and what it should give."""

    def __init__(
        self, prefill: Prefill, make_backend: Callable[[Case, Any], Any]
    ) -> None:
        case = prefill.case
        self.prefill, self.truth = prefill, Truth(prefill)
        pages = 2 + ROWS * -(-case.max_len // (case.page_size * case.dcp_size))
        self.served = Served(case.page_size, case.dcp_size, case.max_len, pages)
        self.table = self.served.table.to(case.device, copy=True)
        slots = pages * case.page_size

        def make(case: Case, runner: Any) -> Any:
            # SGLang scales scores by the dims of an expanded head, absorbed or not.
            runner.model_config.scaling = self.truth.scaling
            return make_backend(case, runner)

        self.ranks = [
            Rank(case, rank, self.table, slots, make) for rank in range(case.dcp_size)
        ]
        self.modules = [deepseek(rank, prefill, self.truth) for rank in self.ranks]
        self.exchanges = [NotedExchange(case.dcp_size) for _ in self.ranks]
        for rank, exchange in zip(self.ranks, self.exchanges):
            rank.backend.exchange = exchange  # type: ignore[assignment]
            rank.backend.prefill._exchange = exchange  # type: ignore[assignment]

    def run(self, step: Step) -> None:
        if step.mode == "MOVE":
            self._move(step)
            return
        new = {name: self.served.grow(name, n) for name, n in step.tokens.items()}
        self.table.copy_(self.served.table)
        batch = self._batch(self.served.batch(step.mode, new))
        inputs = [
            torch.cat(part).to(self.prefill.dtype)
            for part in zip(
                *([p[list(at)] for p in self.truth.of(r)] for r, at in new.items())
            )
        ]
        tokens = len(inputs[0])
        stays = [r in self.prefill.in_place and at.start > 0 for r, at in new.items()]
        inputs = [self._padded(part, math.nan) for part in inputs]
        batch.out_cache_loc = self._padded(batch.out_cache_loc, 0)
        self._pass(inputs, batch, stays)
        answer(self.exchanges, reduces=False)
        out = self._pass(inputs, batch, stays)
        if any(stays):
            answer(self.exchanges, reduces=True)
            out = self._pass(inputs, batch, stays)
        for exchange in self.exchanges:
            exchange.answers.clear()
        assert not out[tokens:].any()
        out = out[:tokens]
        # In one shot new tokens come from the pool; with prefix chunks they are as projected.
        total = sum(at.stop for at in new.values())
        prefixes = any(at.start for at in new.values())
        read_back = prefixes and total <= self.prefill.capacity and not any(stays)
        wanted = torch.cat(
            [self.truth.attention(*r, read_back=read_back) for r in new.items()]
        )
        torch.testing.assert_close(out.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
        self._check_pools()

    def _padded(self, rows: Tensor, value: float) -> Tensor:
        padding = rows.new_full((self.prefill.padding, *rows.shape[1:]), value)
        return torch.cat([rows, padding])

    def _batch(self, served: Any) -> Any:
        device = self.prefill.device
        fields = {
            name: (
                value.to(device)
                if isinstance(value, Tensor) and not name.endswith("_cpu")
                else value
            )
            for name, value in vars(served).items()
        }
        return batch_kind()(**fields)

    def _pass(self, inputs: list[Tensor], batch: Any, stays: list[bool]) -> Tensor:
        """[tokens, heads, v_dim] of all ranks, each with a batch of its own."""
        q, latent, rope = inputs
        for exchange in self.exchanges:
            exchange.calls.clear()
        outs = [
            self._forward(rank, module, q, latent, rope, copy.copy(batch), stays)
            for rank, module in zip(self.ranks, self.modules)
        ]
        return torch.cat(outs, 1)

    def _forward(
        self,
        rank: Rank,
        module: Any,
        q: Tensor,
        latent: Tensor,
        rope: Tensor,
        batch: Any,
        stays: Sequence[bool] = (),
    ) -> Tensor:
        """[tokens, local heads, v_dim] of a rank, in a prefill graph or not."""
        from sglang.srt.model_executor.forward_context import (
            ForwardContext,
            forward_context,
        )

        attend = partial(self._attend, rank, module, stays)
        with forward_context(ForwardContext(rank.backend)):
            rank.backend.init_forward_metadata(batch)
            if self.prefill.replayed:
                return self._replay(rank, module, attend, (q, latent, rope), batch)
            return attend(q, latent, rope, batch)

    def _replay(
        self,
        rank: Rank,
        module: Any,
        attend: Callable[..., Tensor],
        projected: tuple[Tensor, Tensor, Tensor],
        batch: Any,
    ) -> Tensor:
        """The same from between two segments, which have more rows and one tensor of them."""
        hidden = torch.cat([part.flatten(1) for part in projected], -1)
        tokens, width = hidden.shape
        dims = [part[0].numel() for part in projected]
        sizes = rank.local_heads, self.prefill.sizes.v

        def forward(
            module: Any, at: Tensor, rows: Tensor, batch: Any, _: Any
        ) -> Tensor:
            q, latent, rope = rows.split(dims, dim=-1)
            q = q.view(len(q), *projected[0].shape[1:])
            out = attend(q, latent, rope, batch).flatten(1)
            return pad(out, (0, width - out.shape[1]))

        rows = tokens + self.prefill.replayed
        static = static_batch(batch, rows)
        positions = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        given = module, positions, padded(hidden, rows), static, None
        with replay(rank.backend, static):
            out: Tensor = eager_region.attention_forward(forward, *given)
        assert not out[tokens:].any()
        return out[:tokens, : math.prod(sizes)].view(-1, *sizes)

    def _attend(
        self,
        rank: Rank,
        module: Any,
        stays: Sequence[bool],
        q: Tensor,
        latent: Tensor,
        rope: Tensor,
        batch: Any,
    ) -> Tensor:
        """From behind the projections of `forward_normal_prepare` on."""
        sizes = self.prefill.sizes
        latent = latent.clone()
        # As in SGLang, views of wider rows.
        k_pe = torch.cat([latent, rope], -1)[:, None, sizes.latent :]
        # As the hook of the forward method does, and then the method.
        form = expanded_form(dispatch.prefill_batch(batch))
        if any(stays):
            form = PrefillForm.BY_GROUP
            groups = Groups(stays, 0.0)
            rank.backend.prefill.prepare_groups(batch, module, lambda: groups)
        else:
            rank.backend.prefill.prepare(batch, form)
        if form is PrefillForm.ONE_SHOT:
            batch.mha_one_shot, core = True, module.forward_normal_one_shot_core
        else:
            core = module.forward_normal_chunked_kv_core
        module._set_mla_kv_buffer(None, latent, k_pe, batch)
        if batch.mha_one_shot:
            latent, k_pe = module._get_mla_kv_buffer(
                batch.fetch_mha_one_shot_kv_indices(), q.dtype, batch
            )
        kv = module.kv_b_proj(latent)[0].view(len(latent), rank.local_heads, -1)
        k_nope, v = kv.split([sizes.nope, sizes.v], dim=-1)
        k = module._concat_and_cast_mha_k(k_nope, k_pe, batch)
        out: Tensor = core(q[:, rank.own].contiguous(), k, v, batch)
        return out.view(len(q), rank.local_heads, sizes.v)

    def _check_pools(self) -> None:
        """Every position that a rank owns lies at its slot, bit for bit."""
        for number, rank in enumerate(self.ranks):
            for name in self.served.rows:
                slots = self.served.local_slots(name, number)
                _, latent, rope = self.truth.of(name)
                wanted = torch.cat([latent, rope], -1)[list(slots)]
                keys = rank.pool.get_key_buffer(0).double()
                got = keys[list(slots.values()), 0]
                assert torch.equal(got, self.truth.stored(wanted)), name

    def _move(self, step: Step) -> None:
        """The scheduler gives requests other slots; their latents go along."""
        for name in step.tokens:
            every = range(self.prefill.dcp_size)
            old = [list(self.served.local_slots(name, r).values()) for r in every]
            self.served.relocate(name)
            for r, before in enumerate(old):
                buffer = self.ranks[r].pool.kv_buffer[0]
                after = list(self.served.local_slots(name, r).values())
                buffer[after] = buffer[before]


@contextmanager
def surroundings(prefill: Prefill) -> Iterator[None]:
    """SGLang's process-wide state, DCP on."""
    with (
        sglang_context(prefill.device, **prefill.case.arguments),
        attention_width(prefill.dcp_size),
        mock.patch.object(dispatch, "find_context", object),
        mock.patch.object(eager_region, "find_context", object),
        mock.patch.dict("os.environ", {CAPACITY: str(prefill.capacity)}),
    ):
        yield


def serve(
    prefill: Prefill,
    steps: list[Step] = SCRIPT,
    make_backend: Callable[[Case, Any], Any] = real_backend,
) -> Group:
    """A life of requests, prefill upon prefill."""
    with surroundings(prefill):
        group = Group(prefill, make_backend)
        for step in steps:
            group.run(step)
    return group


def cases_of(base: Prefill, capacity: int) -> dict[str, Prefill]:
    """What the tests with and without a GPU have in common."""
    named = {
        f"dcp{dcp}-page{page}": replace(base, dcp_size=dcp, page_size=page)
        for dcp, page in ((2, 1), (2, 16), (4, 64), (8, 1))
    }
    for dcp, page in ((2, 1), (4, 16)):
        named[f"prefix-chunks-dcp{dcp}-page{page}"] = replace(
            base, dcp_size=dcp, page_size=page, capacity=capacity
        )
    for dcp, page, most in ((2, 1, base.capacity), (2, 16, capacity), (4, 1, capacity)):
        named[f"by-group-dcp{dcp}-page{page}-{most}"] = replace(
            base, dcp_size=dcp, page_size=page, capacity=most, in_place="abfc"
        )
    # No prefix is gathered, and tokens of no request follow.
    named["by-group-all-in-place"] = replace(base, in_place="abcdef", padding=3)
    # In one shot and in prefix chunks.
    for most in (base.capacity, capacity):
        named[f"padded-{most}"] = replace(base, padding=3, capacity=most)
        if HAS_PREFILL_GRAPHS:
            replayed = replace(base, replayed=5, capacity=most)
            named[f"in-graph-{most}"] = replayed
            named[f"in-graph-by-group-{most}"] = replace(replayed, in_place="abfc")
    return named
