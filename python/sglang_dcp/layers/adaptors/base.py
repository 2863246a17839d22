"""What `DcpAttentionBackend` asks of an inner attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Partial(NamedTuple):
    """Attention over some of the keys.

    `out` [tokens, heads, v_dim] in the query's dtype, `lse` [tokens, heads] float32 in
    the adaptor's log base. Rows without keys may hold anything: the caller masks them.
    """

    out: torch.Tensor
    lse: torch.Tensor


class MhaKeys(NamedTuple):
    """Which keys a call of MLA's prefill by MHA is given, request after request.

    Attributes
    ----------
    piece : int, optional
        Many-th piece of the prefixes. None: up to the new tokens, causally seen, so that
        a request's last key is its last new token.
    lens : sequence of int
        Keys of each request.
    ends : Tensor [requests + 1] int32
        The same cumulated from 0 on, where the kernels are.
    """

    piece: Optional[int]
    lens: Sequence[int]
    ends: torch.Tensor


class DcpAdaptor(ABC):
    """An attention backend that knows nothing of DCP but to return its LSE.

    It sees a local batch: lengths, slots and slot table of this rank's own pool.

    Attributes
    ----------
    is_lse_base_on_e : bool
        Natural logarithm (torch, FA3, Triton) or base 2 (FlashInfer).
    """

    is_lse_base_on_e: bool

    @classmethod
    def from_runner(cls, runner: Any) -> DcpAdaptor:
        """Build from a `LocalRunner`."""
        raise NotImplementedError(f"{cls.__name__} is not built from a runner")

    def init_forward_metadata(self, batch: ForwardBatch, local: ForwardBatch) -> None:
        """Plan for one eager forward; both views of the same batch."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what captured decode steps read; before the first capture."""
        raise NotImplementedError(f"{type(self).__name__} has no CUDA graphs")

    def init_graph_metadata(self, local: ForwardBatch, in_capture: bool) -> None:
        """Plan a captured or replayed decode step, outside the graph."""
        raise NotImplementedError(f"{type(self).__name__} has no CUDA graphs")

    @abstractmethod
    def decode(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        """One query per request against the rank's own keys (`local.seq_lens`).

        `q` [requests, heads of the attn_tp shard, qk_dim].
        """

    def decode_parts(
        self,
        latent: torch.Tensor,
        rope: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
    ) -> Partial:
        """`decode` of MLA's queries where they are in two parts, [.., heads, dim] each."""
        return self.decode(torch.cat([latent, rope], dim=-1), layer, local)

    @abstractmethod
    def extend_new(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
    ) -> Partial:
        """New tokens among themselves, causal, per request (`batch.extend_seq_lens`).

        `q` [tokens, own heads, qk_dim]; `k`, `v` cut to the heads that serve them.
        """

    def extend_mha(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        batch: ForwardBatch,
        keys: MhaKeys,
    ) -> Partial:
        """MLA's new tokens against K and V of own heads, [keys, own heads, dim].

        `k` and `v` may be views of wider rows.
        """
        raise NotImplementedError(f"{type(self).__name__} has no MHA for MLA")

    @abstractmethod
    def extend_prefix(
        self, q: torch.Tensor, layer: RadixAttention, local: ForwardBatch
    ) -> Partial:
        """New tokens against the rank's own prefix keys (`local.seq_lens`), not causal.

        `q` [tokens, heads of the attn_tp shard, qk_dim].
        """


class PlannedAdaptor(DcpAdaptor):
    """An adaptor over one of SGLang's own backends, which plans decode.

    Built on a `LocalRunner` and fed the local batch, SGLang's backend plans for this
    rank's pool, in CUDA graphs too; the adaptor calls the kernels with their LSE.

    Attributes
    ----------
    creator : str
        Function of SGLang's attention registry that builds the backend.
    """

    creator: ClassVar[str]

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @classmethod
    def from_runner(cls, runner: Any) -> PlannedAdaptor:
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
        """This rank's [slots, kv heads, dim] of K and of V, in the cache's dtype."""
        return self._inner.token_to_kv_pool.get_kv_buffer(layer.layer_id)


def cumulated(lens: torch.Tensor) -> torch.Tensor:
    """From 0 on, [..., lengths + 1] int32, on the lengths' device."""
    ends = lens.cumsum(-1, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))


def local_pages(
    table: torch.Tensor, local: ForwardBatch, page_size: int
) -> torch.Tensor:
    """[requests, pages of the longest] int32: pages of this rank's pool, in order.

    Sized from host lengths, so it does not wait for the GPU; past a request's own end
    an entry may be anything that once was a page.
    """
    longest = max(int(local.seq_lens_cpu.max()), 1)
    slots = table[local.req_pool_indices, :longest:page_size]
    return (slots // page_size).to(torch.int32)


def kv_scales(
    layer: RadixAttention, keys: torch.Tensor
) -> tuple[Optional[float], Optional[float]]:
    """What K and V in the cache of `keys` were divided by; None: by nothing.

    A checkpoint may bring scales that a cache in the model's dtype does not use.
    """
    if keys.itemsize > 1:
        return None, None
    return layer.k_scale_float, layer.v_scale_float
