"""What `test_attention*.py` share: a served batch by hand, and attention over all keys.

Every rank knows the whole truth (Q, K, V of all requests, layers and heads) and gives
the backend only what its place in the layout entitles it to.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from types import SimpleNamespace
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor

from sglang_dcp.layers.backends.base import InnerBackend, Partial

NAN = float("nan")
NONE = torch.empty(0)
MAX_LEN = 48
ROWS = 9
LAYERS = 2
LOCAL_PAGES = 400


class Shape(NamedTuple):
    """Attention heads of the whole model."""

    q_heads: int
    kv_heads: int
    qk_dim: int = 20
    v_dim: int = 12
    latent: bool = False  # MLA: one pool, V is the front of K
    in_parts: bool = False  # of MLA, latent and rotary part apart


class Step(NamedTuple):
    """One forward, or the scheduler moving requests to other slots.

    `tokens` is new tokens by request, in batch order.
    """

    mode: str
    tokens: dict[str, int]


def extend(**tokens: int) -> Step:
    return Step("EXTEND", tokens)


def mixed(**tokens: int) -> Step:
    return Step("MIXED", tokens)


def decode(requests: str) -> Step:
    return Step("DECODE", dict.fromkeys(requests, 1))


def move(requests: str) -> Step:
    return Step("MOVE", dict.fromkeys(requests, 0))


def verify(requests: str, width: int) -> Step:
    """The target model's forward over `width` tokens of each request."""
    return Step("TARGET_VERIFY", dict.fromkeys(requests, width))


def draft_extend(requests: str, width: int) -> Step:
    """The draft model's forward over the tokens of a verification."""
    return Step("DRAFT_EXTEND_V2", dict.fromkeys(requests, width))


def draft(requests: str, steps: int) -> Step:
    """The draft model's forwards over one token after the other, planned at once."""
    return Step("DRAFT", dict.fromkeys(requests, steps))


def reject(**tokens: int) -> Step:
    """So many tokens at the end of a request are taken back."""
    return Step("REJECT", tokens)


class Truth:
    """Q, K and V of every position of every request, per layer, on all ranks alike."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        max_len: int = MAX_LEN,
        device: str = "cpu",
        kv_scale: float = 1.0,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._max_len, self._device, self._kv_scale = max_len, device, kv_scale
        self._made: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, request: str, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 values, [positions, heads, dim]; K and V are `kv_scale` x `dtype`'s."""
        if (request, layer) not in self._made:
            gen = torch.Generator().manual_seed(100 * ord(request) + layer)
            s = self.shape
            q, k, v = (
                self._draw(gen, *sizes)
                for sizes in (
                    (s.q_heads, s.qk_dim),
                    (s.kv_heads, s.qk_dim),
                    (s.kv_heads, s.v_dim),
                )
            )
            k, v = k * self._kv_scale, v * self._kv_scale
            # Twice the usual spread: flat scores would prove nothing.
            self._made[request, layer] = 2 * q, k, k[..., : s.v_dim] if s.latent else v
        return self._made[request, layer]

    def _draw(self, gen: torch.Generator, *sizes: int) -> Tensor:
        drawn = torch.randn(self._max_len, *sizes, generator=gen)
        return drawn.to(self.dtype).double().to(self._device)

    def attention(self, request: str, layer: int, positions: range) -> Tensor:
        """[positions, all heads, v_dim], by a softmax over all keys up to each."""
        q, k, v = self.of(request, layer)
        heads = torch.arange(self.shape.q_heads, device=self._device)
        served_by = heads // (self.shape.q_heads // self.shape.kv_heads)
        keys = slice(0, positions.stop)
        scores = torch.einsum("phd,khd->phk", q[list(positions)], k[keys, served_by])
        at = torch.arange(positions.stop, device=self._device)
        later = at > at[positions.start :, None]
        scores = scores * self.shape.qk_dim**-0.5
        scores = scores.masked_fill(later[:, None], float("-inf"))
        return torch.einsum("phk,khd->phd", scores.softmax(-1), v[keys, served_by])


class FakePool:
    """One rank's K and V, NaN where nothing was written. Page 0 forgets at once."""

    def __init__(
        self, shape: Shape, kv_heads: int, slots: int, page_size: int, dtype: Any
    ) -> None:
        sizes = (LAYERS, slots, kv_heads)
        self.start_layer, self.layer_num = 0, LAYERS
        self._page_size = page_size
        self._latent, self._v_dim, self.dtype = shape.latent, shape.v_dim, dtype
        self.keys = torch.full((*sizes, shape.qk_dim), NAN, dtype=dtype)
        self.values = torch.full((*sizes, shape.v_dim), NAN, dtype=dtype)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.keys[layer_id]

    def get_value_buffer(self, layer_id: int) -> Tensor:
        if self._latent:
            return self.keys[layer_id, ..., : self._v_dim]
        return self.values[layer_id]

    def set_kv_buffer(self, layer: Any, where: Any, k: Tensor, v: Tensor) -> None:
        keys, values = self.keys[layer.layer_id], self.values[layer.layer_id]
        keys[where.loc] = k.view(-1, *keys.shape[1:])
        if not self._latent:
            values[where.loc] = v.view(-1, *values.shape[1:])
        keys[: self._page_size] = values[: self._page_size] = NAN

    def set_mla_kv_buffer(self, layer: Any, loc: Tensor, *parts: Tensor) -> None:
        self.set_kv_buffer(layer, SimpleNamespace(loc=loc), torch.cat(parts, -1), NONE)

    def move(self, old: Sequence[int], new: Sequence[int]) -> None:
        for buffer in (self.keys, self.values):
            buffer[:, new] = buffer[:, old]
            buffer[:, old] = NAN

    def forget(self, slots: Sequence[int]) -> None:
        self.keys[:, slots] = self.values[:, slots] = NAN


class Served:
    """Requests with their logical slots, as scheduler and allocator would leave them."""

    def __init__(
        self,
        page_size: int,
        dcp_size: int,
        max_len: int = MAX_LEN,
        local_pages: int = LOCAL_PAGES,
    ) -> None:
        self.page_size, self.dcp_size = page_size, dcp_size
        self.logical_page = page_size * dcp_size
        self._free_pages = list(range(2, local_pages))
        random.Random(5).shuffle(self._free_pages)
        # Unused entries lead to logical page 1, which holds NaN for ever.
        self.table = torch.full((ROWS, max_len), self.logical_page, dtype=torch.int32)
        self._row_order = [6, 4, 7, 1, 8, 2, 5]
        self.rows: dict[str, int] = {}
        self.pages: dict[str, list[int]] = {}
        self.lens: dict[str, int] = {}

    def slots(self, request: str, positions: range) -> list[int]:
        pages, size = self.pages[request], self.logical_page
        return [pages[p // size] * size + p % size for p in positions]

    def local_slots(self, request: str, dcp_rank: int) -> dict[int, int]:
        """Local slot of each position that `dcp_rank` owns: by page and place in it."""
        pages, size = self.pages.get(request, []), self.logical_page
        return {
            p: pages[p // size] * self.page_size + p % size // self.dcp_size
            for p in range(self.lens.get(request, 0))
            if p % self.dcp_size == dcp_rank
        }

    def grow(self, request: str, tokens: int) -> range:
        """Positions of `tokens` new tokens."""
        if request not in self.rows:
            self.rows[request] = self._row_order.pop()
            self.pages[request], self.lens[request] = [], 0
        first = self.lens[request]
        self.lens[request] = first + tokens
        while len(self.pages[request]) * self.logical_page < first + tokens:
            self.pages[request].append(self._free_pages.pop())
        self._write_row(request)
        return range(first, first + tokens)

    def shrink(self, request: str, tokens: int) -> None:
        """Take back the last tokens. Their pages stay with the request."""
        self.lens[request] -= tokens

    def relocate(self, request: str) -> None:
        self.pages[request] = [self._free_pages.pop() for _ in self.pages[request]]
        self._write_row(request)

    def _write_row(self, request: str) -> None:
        slots = self.slots(request, range(self.lens[request]))
        self.table[self.rows[request], : len(slots)] = torch.tensor(slots).int()

    def batch(self, mode: str, new: dict[str, range]) -> Any:
        """As SGLang's batch, as far as attention reads it."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        slots = [s for name, where in new.items() for s in self.slots(name, where)]
        # Of the speculative forwards, only a draft's extension counts its new tokens.
        committed = mode in ("TARGET_VERIFY", "DRAFT")
        ends = [where.start if committed else where.stop for where in new.values()]
        lens = torch.tensor(ends)
        batch = batch_kind()(
            forward_mode=ForwardMode["DECODE" if mode == "DRAFT" else mode],
            batch_size=len(new),
            req_pool_indices=torch.tensor([self.rows[name] for name in new]),
            seq_lens=lens,
            seq_lens_cpu=lens.clone(),
            seq_lens_sum=int(lens.sum()),
            out_cache_loc=torch.tensor(slots),
            positions=torch.tensor([p for where in new.values() for p in where]),
        )
        if committed or mode == "DRAFT_EXTEND_V2":
            width = len(slots) // len(new)
            batch.spec_info = SimpleNamespace(num_tokens_per_req=width)
        if mode not in ("DECODE", "TARGET_VERIFY", "DRAFT"):
            batch.extend_prefix_lens_cpu = [where.start for where in new.values()]
            batch.extend_seq_lens_cpu = [len(where) for where in new.values()]
            for name in ("extend_prefix_lens", "extend_seq_lens"):
                as_tensor = torch.tensor(getattr(batch, f"{name}_cpu")).int()
                setattr(batch, name, as_tensor)
            ends = batch.extend_seq_lens.cumsum(0, dtype=torch.int32)
            batch.extend_start_loc = ends - batch.extend_seq_lens
        return batch


@functools.cache
def batch_kind() -> type:
    """A namespace with what SGLang's own batch has where nothing sets it.

    A release may read fields that the one before it did not have.
    """
    from sglang.srt.model_executor.forward_batch_deepseek_mha_mixin import (
        ForwardBatchDeepSeekMHAMixin,
    )
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(ForwardBatch)
        if field.default is not dataclasses.MISSING
    }
    return type("Batch", (ForwardBatchDeepSeekMHAMixin, SimpleNamespace), defaults)


class SpyExchange:
    """The real exchange, noting its calls; or the switch of replicated Q."""

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange
        self.calls: list[str] = []

    def gather_heads(self, q: Tensor) -> Tensor:
        self.calls.append("gather")
        return self._exchange.gather_heads(q)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("reduce")
        return self._exchange.reduce(*args, **kwargs)

    def swap_rows(self, sent: Tensor, received: Tensor) -> None:
        self.calls.append("swap")
        # Whatever a rank sends and does not receive, no one may read.
        received.fill_(NAN)
        self._exchange.swap_rows(sent, received)

    def select(self, *, replicated: bool) -> None:
        self.calls.append("replicated" if replicated else "sharded")


class GarbageBackend(InnerBackend):
    """A kernel that leaves rows without keys as its buffers were."""

    is_lse_base_on_e = True

    def __init__(self, inner: Any, lse: float) -> None:
        self._inner, self._lse = inner, lse

    def decode(self, q: Tensor, layer: Any, local: Any) -> Partial:
        partial = self._inner.decode(q, layer, local)
        return self._spoil(partial, local.seq_lens == 0)

    def extend_new_tokens(self, *args: Any) -> Partial:
        return self._inner.extend_new_tokens(*args)

    def extend_paged_prefix(self, q: Tensor, layer: Any, local: Any) -> Partial:
        rows = (local.seq_lens == 0).repeat_interleave(local.extend_seq_lens)
        return self._spoil(self._inner.extend_paged_prefix(q, layer, local), rows)

    def extend_ragged(self, *args: Any) -> Partial:
        *_, batch, keys = args
        rows = (keys.ends.diff() == 0).repeat_interleave(batch.extend_seq_lens)
        return self._spoil(self._inner.extend_ragged(*args), rows)

    def _spoil(self, partial: Partial, rows: Tensor) -> Partial:
        partial.out[rows], partial.lse[rows] = NAN, self._lse
        return partial
