"""The prefixes that stay in place in an MLA prefill by group.

The new tokens of the batch are expanded. Those of some requests are absorbed too, and
attend to their prefix in latents, as in the absorbed form. Heads come out, so that both
parts merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch

from sglang_dcp.layers.backends.base import InnerBackend, Partial
from sglang_dcp.layers.prefix.some_requests import SomeRequests, some_requests
from sglang_dcp.ops.lse_merge import merge_two_states

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class AttendInPlace(Protocol):
    """Attends with local heads to the prefixes of `local`, on all ranks; a collective.

    `empty_rows` marks the tokens whose request has no key on this rank.
    """

    def __call__(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        local: ForwardBatch,
        empty_rows: Optional[torch.Tensor],
    ) -> Partial: ...


class PrefixInPlace:
    """The requests of a forward whose prefix stays in place.

    Parameters
    ----------
    backend : InnerBackend
    attend : AttendInPlace
    """

    def __init__(self, backend: InnerBackend, attend: AttendInPlace) -> None:
        self._backend = backend
        self._attend = attend
        # SGLang's attention module of each layer.
        self._modules: dict[int, Any] = {}
        self._some: Optional[SomeRequests] = None

    @property
    def planned(self) -> bool:
        return self._some is not None

    def init_forward_metadata(self) -> None:
        """Forget the requests of the previous forward."""
        self._some = None

    def learn(self, module: Any) -> None:
        """Take the weights of a layer from SGLang's attention module of DeepSeek.

        Raises
        ------
        RuntimeError
            The layer has weights of another kind than the first one, which chose the form.
        """
        if not absorbs_plainly(module):
            raise RuntimeError("a prefill by group needs plain weights in all layers")
        self._modules[module.attn_mha.layer_id] = module

    def plan(self, local: ForwardBatch, stays: Sequence[bool]) -> None:
        """Plan, once for all layers, for the requests that `stays` marks.

        `local` is the local batch of all requests.
        """
        self._some = some_requests(local, stays)
        self._backend.plan_some_prefixes(self._some.local)

    def merge_into(self, new: Partial, q: torch.Tensor, layer_id: int) -> None:
        """Merge attention to these prefixes into `new`, that of all new tokens.

        Parameters
        ----------
        new : Partial
            [tokens, local heads, v_dim], in the backend's log base.
        q : Tensor [tokens, local heads, nope + rope]
        """
        assert self._some is not None, "no prefix stays in place"
        module = self._modules[layer_id]
        rows, local, empty_rows = self._some
        latent, lse = self._attend(
            absorbed(q[rows], module), module.attn_mqa, local, empty_rows
        )
        base = self._backend.is_lse_base_on_e
        prefix = from_latents(latent, module), lse
        merged = merge_two_states(
            new.out[rows], new.lse[rows], *prefix, is_lse_base_on_e=base
        )
        new.out.index_copy_(0, rows, merged[0])
        new.lse.index_copy_(0, rows, merged[1])


def absorbs_plainly(module: Any) -> bool:
    """Whether plain products absorb: weights in 16 or 32 bit, without adapters.

    SGLang has other products for quantized weights.
    """
    weights = module.w_kc, module.w_vc
    plain = all(
        type(w) is torch.Tensor and w.is_floating_point() and w.itemsize > 1
        for w in weights
    )
    return (
        plain
        and not module.use_deep_gemm_bmm
        and not getattr(module.kv_b_proj, "set_lora", False)
    )


def absorbed(q: torch.Tensor, module: Any) -> torch.Tensor:
    """Absorb queries [tokens, heads, nope + rope]: [tokens, heads, latent + rope]."""
    parts = [module.qk_nope_head_dim, module.qk_rope_head_dim]
    nope, rope = q.split(parts, dim=-1)
    latent = torch.bmm(nope.transpose(0, 1), module.w_kc).transpose(0, 1)
    return torch.cat([latent, rope], dim=-1)


def from_latents(out: torch.Tensor, module: Any) -> torch.Tensor:
    """Bring outputs [tokens, heads, latent] to the values of heads: [..., v_dim]."""
    return torch.bmm(out.transpose(0, 1), module.w_vc).transpose(0, 1)
