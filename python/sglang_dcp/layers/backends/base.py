"""The interface of an inner attention backend, which `DcpAttentionBackend` calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

import torch

from sglang_dcp.layers.backends.capabilities import BackendCapabilities

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Partial(NamedTuple):
    """The partial output of attention over some of the keys.

    `out` is [tokens, heads, v_dim] in the query's dtype. `lse` is [tokens, heads] float32
    in the backend's log base. Rows without keys may hold anything: the caller masks them.
    """

    out: torch.Tensor
    lse: torch.Tensor


class NewBehindPrefix(NamedTuple):
    """Where new tokens lie among keys, each request's behind its prefix, on the device.

    Attributes
    ----------
    new : Tensor [new tokens] int64
        Rows of the new tokens, in their order.
    prefix : Tensor [prefix positions] int64
        Rows of the prefixes, request after request.
    prefix_ends : Tensor [requests + 1] int32
        Lengths of the prefixes, cumulated from 0 on.
    """

    new: torch.Tensor
    prefix: torch.Tensor
    prefix_ends: torch.Tensor


class RaggedKeys(NamedTuple):
    """The keys of one attention call outside the pool, request after request.

    Attributes
    ----------
    prefix_chunk : int, optional
        Index of the prefix chunk; a prefix that is not cut is chunk 0. If it is None, the
        keys end with the new tokens, and attention is causal: a request's last key is its
        last new token.
    lens : sequence of int
        Number of keys of each request.
    ends : Tensor [requests + 1] int32
        The same numbers, cumulated from 0 on, on the device.
    rows : NewBehindPrefix, optional
        With new tokens behind a prefix of K/V heads, where both lie.
    """

    prefix_chunk: Optional[int]
    lens: Sequence[int]
    ends: torch.Tensor
    rows: Optional[NewBehindPrefix] = None

    def are_new(self, tokens: int) -> bool:
        """Whether these are the batch's new `tokens` alone, without a prefix."""
        return self.prefix_chunk is None and sum(self.lens) == tokens


class InnerBackend(ABC):
    """An attention backend that knows nothing of DCP, except that it returns its LSE.

    It sees a local batch: lengths, slots and slot table of this rank's pool.

    Attributes
    ----------
    is_lse_base_on_e : bool
        True for natural log (torch, FA3, Triton), False for base 2 (FlashInfer).
    capabilities : BackendCapabilities
        What its kernels were made and checked for.
    head_tile : int, optional
        Heads that a decode kernel takes at a time, if a tile of them may not belong to two
        K/V heads. See `folding_of`.
    splits_ragged_below : float
        Tiles of query rows of a request below which `extend_ragged` splits the keys of a
        prefix, so that all SMs have work. 0 if it never does.
    planned_outputs : tuple of int
        Partial outputs, each of one head and in float32, that the plan of a decode step
        holds: so many for each head of a row, and so many beside them.
    """

    is_lse_base_on_e: bool
    capabilities: ClassVar[BackendCapabilities]
    head_tile: ClassVar[Optional[int]] = None
    splits_ragged_below: ClassVar[float] = 0

    @property
    def planned_outputs(self) -> tuple[int, int]:
        return 0, 0

    @classmethod
    def from_runner(cls, runner: Any) -> InnerBackend:
        """Build from a `RunnerView`."""
        raise NotImplementedError(f"{cls.__name__} is not built from a runner")

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        """Plan one eager forward. `batch` is SGLang's batch, `local` its local batch."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode steps read, before the first capture."""
        raise NotImplementedError(f"{type(self).__name__} has no CUDA graphs")

    def init_graph_metadata(self, local: ForwardBatch, in_capture: bool) -> None:
        """Plan a captured or replayed decode step, outside the graph."""
        raise NotImplementedError(f"{type(self).__name__} has no CUDA graphs")

    @abstractmethod
    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        """Attend with one query of each request to the rank's local keys.

        `q` is [requests, heads, qk_dim], with the heads of the DCP group, or with those of
        all query tokens of a chain (`Folding`). `local.seq_lens` counts the keys. Must be
        safe in CUDA-graph capture if the backend has CUDA graphs.
        """

    def decode_parts(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        """Do `decode` for MLA's queries in two parts, [requests, heads, dim] each."""
        return self.decode(torch.cat([latent, rope], dim=-1), layer, local)

    @abstractmethod
    def extend_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        """Attend with the new tokens of each request to themselves, causally.

        `q` is [tokens, local heads, qk_dim]. `k` and `v` are [tokens, K/V heads, dim] and
        hold only the heads that serve the local heads. `batch.extend_seq_lens` counts the
        tokens.
        """

    def extend_ragged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: RaggedKeys,
    ) -> Partial:
        """Attend with new tokens to `keys`, gathered from all ranks.

        `q` is [tokens, local heads, qk_dim]. `k` and `v` are [keys, K/V heads, dim], hold
        only the heads that serve the local heads, and may be views of wider rows. Those of
        an expanded MLA prefill have a head for each local head. Never captured.
        """
        raise NotImplementedError(f"{type(self).__name__} attends to its pool alone")

    def plan_some_prefixes(self, local: ForwardBatch) -> None:
        """Plan `extend_paged_prefix` for some requests of the forward that is planned.

        `local` is their part of the local batch. Other calls keep their plans.
        """
        raise NotImplementedError(f"{type(self).__name__} plans for whole batches")

    @abstractmethod
    def extend_paged_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        """Attend with new tokens to the rank's local prefix keys, not causally.

        `q` is [tokens, heads of the DCP group, qk_dim]. `local.seq_lens` counts the keys.
        """


class PlannedBackend(InnerBackend):
    """An inner backend that lets one of SGLang's backends plan decode.

    SGLang's backend is built on a `RunnerView` and gets the local batch. So it plans for
    this rank's pool, in CUDA graphs too. This class calls the kernels with their LSE.

    Attributes
    ----------
    creator : str
        Function of SGLang's attention registry that builds SGLang's backend.
    """

    creator: ClassVar[str]

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @classmethod
    def from_runner(cls, runner: Any) -> PlannedBackend:
        return cls(cls._build_inner(runner))

    @classmethod
    def _build_inner(cls, runner: Any) -> Any:
        from sglang.srt.layers.attention import attention_registry

        return getattr(attention_registry, cls.creator)(runner)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self._inner.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_graph_metadata(self, local: ForwardBatch, in_capture: bool) -> None:
        self._inner.init_forward_metadata_out_graph(local, in_capture=in_capture)

    def _kv(self, layer: RadixAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's K and V, [slots, kv heads, dim] each, in the cache's dtype."""
        return self._inner.token_to_kv_pool.get_kv_buffer(layer.layer_id)


def cumulated(lens: torch.Tensor) -> torch.Tensor:
    """Cumulate lengths from 0 on: [..., lengths + 1] int32, on the device of `lens`."""
    ends = lens.cumsum(-1, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))


def local_pages(
    table: torch.Tensor, local: ForwardBatch, page_size: int
) -> torch.Tensor:
    """List pages of this rank's pool: [requests, pages of the longest] int32, in order.

    The size comes from host lengths, so nothing waits for the GPU. Entries beyond a
    request's end may be stale pages.
    """
    longest = max(int(local.seq_lens_cpu.max()), 1)
    slots = table[local.req_pool_indices, :longest:page_size]
    return (slots // page_size).to(torch.int32)


def kv_scales(
    layer: RadixAttention, keys: torch.Tensor
) -> tuple[Optional[float], Optional[float]]:
    """Return the scales by which K and V in the cache were divided, None for none.

    A checkpoint may have scales that a cache in the model's dtype does not use.
    """
    if keys.itemsize > 1:
        return None, None
    return layer.k_scale_float, layer.v_scale_float
