"""Time on one GPU what the forms of a prefill over a cached prefix take.

New tokens of each request attend to a prefix that a DCP group of 2 holds. The columns are
microseconds of one layer of one rank, in CUDA graphs, with FA3:

- `in_place`: heads of the group attend to the rank's half of the prefix
- `gathered`: the rank's heads attend to the whole prefix, for latents to expanded K and V.
  Keys are split over SMs that would be idle, as in the package
- `whole`: the same without splits
- `expand`: for latents, K and V of the whole prefix from latents
- `absorb`: for latents, the two products around attention in place

The rule that chooses a form estimates these (`mla/cost.py`, `prefix/kv_form.py`). Values are
random, and no model runs. It does not measure the exchange, the gather, launches, nor the new
tokens' attention to themselves.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from bench_verification import DCP, DEVICE, NAMES, microseconds, rows_of
from decode_models import MODELS, is_mla, query_heads
from sglang_dcp.layers.backends.fa3_splits import (
    Fa3Heads,
    prefix_splits,
    ragged_splits,
)

# A call takes up to a tenth of a second here.
CALLS, REPEATS = 2, 3


class Sizes(NamedTuple):
    """Sizes of a rank's attention: query heads, and the dims of one.

    Attributes
    ----------
    latent, rope, nope : dims of a latent, of its rotary key, and of the rest of a key; 0 for
        K/V heads
    qk, v : dims of a head of K and V, for latents once expanded
    """

    heads: int
    qk: int
    v: int
    latent: int = 0
    rope: int = 0
    nope: int = 0


def sizes_of(name: str) -> Sizes:
    """Return the sizes of a model at tp 2."""
    config, heads = MODELS[name], query_heads(name) // DCP
    if not is_mla(name):
        return Sizes(heads, config["head_dim"], config["head_dim"])
    rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    latent = config["kv_lora_rank"]
    return Sizes(heads, rope + nope, config["v_head_dim"], latent, rope, nope)


class Turns(NamedTuple):
    """Requests of a prefill, all alike: how many, cached positions, new tokens."""

    batch: int
    prefix: int
    new: int

    @property
    def tokens(self) -> int:
        return self.batch * self.new

    @property
    def positions(self) -> int:
        return self.batch * self.prefix

    def ends(self, length: int) -> Tensor:
        """Return where requests of `length` rows end, in a tensor of all rows."""
        rows = torch.arange(self.batch + 1, device=DEVICE, dtype=torch.int32)
        return rows * length


def in_place(sizes: Sizes, turns: Turns) -> Callable[[], Any]:
    """Return a call of attention as the package has it over the rank's own pages."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    heads, local = sizes.heads * DCP, turns.prefix // DCP
    batch, new, slots = turns.batch, turns.new, turns.batch * local
    if sizes.latent:
        # A row of the pool holds a latent and then its rotary key.
        stored, v = sizes.latent + sizes.rope, sizes.latent
        v_cache, k_cache = rows_of(slots, 1, stored).split([v, sizes.rope], -1)
    else:
        stored, v = sizes.qk, sizes.v
        v_cache, k_cache = rows_of(slots, 1, v), rows_of(slots, 1, stored)
    of_call = Fa3Heads(heads, 1, stored, v)
    arguments: dict[str, Any] = dict(
        q=rows_of(turns.tokens, heads, k_cache.shape[-1]),
        k_cache=k_cache.unsqueeze(1),
        v_cache=v_cache.unsqueeze(1),
        qv=rows_of(turns.tokens, heads, v) if sizes.latent else None,
        page_table=torch.randperm(slots, device=DEVICE).int().view(batch, -1),
        cache_seqlens=torch.full((batch,), local, device=DEVICE, dtype=torch.int32),
        cu_seqlens_q=turns.ends(new),
        max_seqlen_q=new,
        num_splits=prefix_splits(of_call, turns.tokens, new),
    )
    return lambda: flash_attn_with_kvcache(
        **arguments, softmax_scale=0.1, causal=False, return_softmax_lse=True
    )


def gathered(sizes: Sizes, turns: Turns, *, split: bool = True) -> Callable[[], Any]:
    """Return a call of attention to K and V of all positions, in order."""
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    kv_heads = sizes.heads if sizes.latent else 1
    of_call = Fa3Heads(sizes.heads, kv_heads, sizes.qk, sizes.v)
    lengths = turns.tokens, turns.new, turns.prefix
    arguments: dict[str, Any] = dict(
        q=rows_of(turns.tokens, sizes.heads, sizes.qk),
        k=rows_of(turns.positions, kv_heads, sizes.qk),
        v=rows_of(turns.positions, kv_heads, sizes.v),
        cu_seqlens_q=turns.ends(turns.new),
        cu_seqlens_k=turns.ends(turns.prefix),
        max_seqlen_q=turns.new,
        max_seqlen_k=turns.prefix,
        num_splits=ragged_splits(of_call, *lengths) if split else 1,
    )
    return lambda: flash_attn_varlen_func(
        **arguments, softmax_scale=0.1, causal=False, return_softmax_lse=True
    )


def expand(sizes: Sizes, prefix: int) -> Callable[[], Any]:
    """Return a call that makes K and V of a rank's heads from latents."""
    width = sizes.nope + sizes.v
    latents, rope = (
        rows_of(prefix, 1, dim).squeeze(1) for dim in (sizes.latent, sizes.rope)
    )
    weight = rows_of(sizes.latent, sizes.heads, width).flatten(1)

    def call() -> tuple[Tensor, Tensor]:
        made = (latents @ weight).view(prefix, sizes.heads, width)
        of_all = rope.unsqueeze(1).expand(-1, sizes.heads, -1)
        return torch.cat([made[..., : sizes.nope], of_all], -1), made[..., sizes.nope :]

    return call


def absorb(sizes: Sizes, new: int) -> Callable[[], Any]:
    """Return a call of the products that bring queries to latents and outputs back."""
    q, out = (rows_of(sizes.heads, new, dim) for dim in (sizes.nope, sizes.latent))
    to_latent = rows_of(sizes.heads, sizes.nope, sizes.latent)
    back = rows_of(sizes.heads, sizes.latent, sizes.v)
    return lambda: (torch.bmm(q, to_latent), torch.bmm(out, back))


def measure(sizes: Sizes, turns: Turns) -> list[float]:
    calls = [
        in_place(sizes, turns),
        gathered(sizes, turns),
        gathered(sizes, turns, split=False),
    ]
    if sizes.latent:
        calls += [expand(sizes, turns.positions), absorb(sizes, turns.tokens)]
    times = [microseconds(call, REPEATS, calls=CALLS) for call in calls]
    return times + [0.0] * (5 - len(times))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=NAMES, default=NAMES)
    add("--batches", nargs="+", type=int, default=[1])
    add("--prefixes", nargs="+", type=int, default=[32768, 131072, 524288])
    add("--new", nargs="+", type=int, default=[16, 64, 256, 1024, 8192])
    given = parser.parse_args(arguments)
    print("model,batch,prefix,new,in_place,gathered,whole,expand,absorb")
    every = given.models, given.batches, given.prefixes, given.new
    for name, *lengths in itertools.product(*every):
        times = [f"{us:.1f}" for us in measure(sizes_of(name), Turns(*lengths))]
        print(name, *lengths, *times, sep=",", flush=True)


if __name__ == "__main__":
    main()
