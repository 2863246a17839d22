"""The prefixes that an MLA prefill by group keeps in place, against float64.

Only this file sees the LSE that comes back, and the rows of other requests. Whole
prefills: `test_mla_prefill.py`.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_dcp.layers.backends.base import Partial
from sglang_dcp.layers.mla.in_place import PrefixInPlace, absorbed, from_latents

HEADS, LATENT, ROPE, NOPE, V = 3, 16, 4, 6, 5
NEW, PREFIX = [2, 3, 1, 4], [7, 0, 5, 9]
STAYS = [True, False, False, True]
SCALING = (NOPE + ROPE) ** -0.5


class Weights:
    """SGLang's attention module of DeepSeek, as far as absorbing goes."""

    def __init__(self, gen: torch.Generator) -> None:
        self.qk_nope_head_dim, self.qk_rope_head_dim = NOPE, ROPE
        self.w_kc = torch.randn(HEADS, NOPE, LATENT, generator=gen)
        self.w_vc = torch.randn(HEADS, LATENT, V, generator=gen)
        self.attn_mqa = "over latents"
        self.attn_mha = SimpleNamespace(layer_id=3)
        self.kv_b_proj, self.use_deep_gemm_bmm = None, False


def state(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [heads, dim] to [keys, heads, dim], in float64, natural log."""
    scores = torch.einsum("hd,khd->hk", q, keys) * SCALING
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("base_on_e", [True, False])
def test_outputs_and_lses_of_these_requests_are_merged(base_on_e: bool) -> None:
    gen = torch.Generator().manual_seed(5)
    module, tokens = Weights(gen), sum(NEW)
    q = torch.randn(tokens, HEADS, NOPE + ROPE, generator=gen)
    stored = [torch.randn(n, LATENT + ROPE, generator=gen) for n in PREFIX]
    new = [torch.randn(n, HEADS, NOPE + ROPE + V, generator=gen) for n in (1,) * tokens]
    owner = [r for r, count in enumerate(NEW) for _ in range(count)]
    log = 1.0 if base_on_e else math.log(2)

    def expanded(request: int) -> Tensor:
        latent, rope = stored[request].double().split([LATENT, ROPE], -1)
        nope = torch.einsum("kl,hnl->khn", latent, module.w_kc.double())
        values = torch.einsum("kl,hlv->khv", latent, module.w_vc.double())
        ropes = rope[:, None].expand(-1, HEADS, -1)
        return torch.cat([nope, ropes, values], -1)

    def wanted(row: int, with_prefix: bool) -> tuple[Tensor, Tensor]:
        parts = [new[row].double()]
        if with_prefix:
            parts.append(expanded(owner[row]))
        keys, values = torch.cat(parts).split([NOPE + ROPE, V], -1)
        return state(q[row].double(), keys, values)

    def attend(q: Tensor, layer: Any, local: Any, empty_rows: Any) -> Partial:
        assert (layer, local.extend_seq_lens_cpu) == ("over latents", [2, 4])
        assert empty_rows is None and q.shape == (6, HEADS, LATENT + ROPE)
        rows = [r for r, one in enumerate(owner) if STAYS[one]]
        found = []
        for query, row in zip(q.double(), rows):
            keys = stored[owner[row]].double()[:, None].expand(-1, HEADS, -1)
            found.append(state(query, keys, keys[..., :LATENT]))
        outs, lses = map(torch.stack, zip(*found))
        return Partial(outs.float(), (lses / log).float())

    backend: Any = SimpleNamespace(is_lse_base_on_e=base_on_e, planned=[])
    backend.plan_some_prefixes = backend.planned.append
    before = [wanted(row, False) for row in range(tokens)]
    outs, lses = map(torch.stack, zip(*before))
    # As from FA3: the LSE is a view of [heads, tokens].
    lse = (lses / log).float().T.contiguous().T
    partial = Partial(outs.float(), lse)
    in_place = PrefixInPlace(backend, attend)
    in_place.init_forward_metadata()
    assert not in_place.planned
    in_place.learn(module)
    lens, counts = torch.tensor(PREFIX), torch.tensor(NEW)
    local: Any = SimpleNamespace(
        req_pool_indices=torch.arange(4),
        seq_lens=lens,
        seq_lens_cpu=lens,
        extend_seq_lens=counts,
        extend_seq_lens_cpu=NEW,
        out_cache_loc=torch.arange(tokens),
    )
    in_place.plan(local, STAYS)
    assert in_place.planned and len(backend.planned) == 1
    in_place.merge_into(partial, q, layer_id=3)
    for row, (out, lse) in enumerate(zip(*partial)):
        told = wanted(row, STAYS[owner[row]])
        torch.testing.assert_close(out.double(), told[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse.double() * log, told[1], rtol=1e-4, atol=1e-4)


def test_absorbing_changes_no_score_and_no_output() -> None:
    gen = torch.Generator().manual_seed(6)
    module = Weights(gen)
    q = torch.randn(4, HEADS, NOPE + ROPE, generator=gen)
    latent, rope = torch.randn(LATENT, generator=gen), torch.randn(ROPE, generator=gen)
    nope = torch.einsum("hnl,l->hn", module.w_kc, latent)
    key = torch.cat([nope, rope.expand(HEADS, -1)], -1)
    whole = torch.cat([latent, rope])
    torch.testing.assert_close(absorbed(q, module) @ whole, (q * key).sum(-1))
    out = torch.randn(4, HEADS, LATENT, generator=gen)
    told = torch.einsum("thl,hlv->thv", out, module.w_vc)
    torch.testing.assert_close(from_latents(out, module), told)


def test_a_layer_with_quantized_weights_is_told() -> None:
    """The first layer chose the form, for all of them."""
    nothing: Any = None
    module = Weights(torch.Generator())
    module.w_kc = module.w_kc.to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="plain weights in all layers"):
        PrefixInPlace(nothing, nothing).learn(module)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
