"""Time attention of a verification, or of a short prefill, on one GPU, in its two forms.

`w` query tokens of a request see the same committed keys. The columns are microseconds of
one call in CUDA graphs, with FA3:

- `decode`: one query token of each request, for comparison
- `rows`: each query token as a row of its own, which reads the keys again
- `folded`: the query tokens as more heads of one query, as the package has it
- `chain`: what `folded` needs besides, the query tokens among themselves and the merge

The query tokens are those of a verification, or the new tokens of a short prefill.

Heads are those of a DCP group of 2, keys are half of the context. Values are random, and
no model runs. It does not measure the exchange, nor other kernels of a step.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor

from decode_models import MODELS, is_mla, query_heads
from sglang_dcp.ops.chains import Chains, ChainSizes, attend_chains

DEVICE = "cuda"
DCP = 2
CALLS = 8


class Heads(NamedTuple):
    """Heads of a DCP group, and the dims of one: of Q and K, and of V.

    FA3 takes the latent part of a latent head as V, and its queries as QV.
    """

    heads: int
    qk: int
    v: int
    latent: bool


# Of `decode_models`, with one K/V head at tp 2.
NAMES = ("Qwen3-30B-A3B/4", "DeepSeek-V2-Lite")


def heads_of(name: str) -> Heads:
    """Return the heads of a model's DCP group at tp 2."""
    config, heads = MODELS[name], query_heads(name)
    if is_mla(name):
        return Heads(heads, config["qk_rope_head_dim"], config["kv_lora_rank"], True)
    return Heads(heads, config["head_dim"], config["head_dim"], False)


class Keys(NamedTuple):
    """A rank's pages of one K/V head, and the pages of each request."""

    k: Tensor
    v: Tensor
    table: Tensor
    lens: Tensor


def rows_of(tokens: int, heads: int, dim: int) -> Tensor:
    return torch.randn(tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16)


def make_keys(model: Heads, context: int, batch: int, page: int) -> Keys:
    local = context // DCP
    pages = local * batch // page
    k, v = (
        rows_of(pages * page, 1, dim).view(pages, page, 1, dim)
        for dim in (model.qk, model.v)
    )
    table = torch.randperm(pages, device=DEVICE).int().view(batch, -1)
    lens = torch.full((batch,), local, device=DEVICE, dtype=torch.int32)
    return Keys(k, v, table, lens)


def attention(model: Heads, keys: Keys, rows: int, heads: int) -> Callable[[], Any]:
    """Return a call with `rows` queries of `heads` heads, as many for each request."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    repeats = rows // len(keys.lens)
    arguments: dict[str, Any] = dict(
        q=rows_of(rows, heads, model.qk),
        k_cache=keys.k,
        v_cache=keys.v,
        qv=rows_of(rows, heads, model.v) if model.latent else None,
        page_table=keys.table.repeat_interleave(repeats, 0),
        cache_seqlens=keys.lens.repeat_interleave(repeats),
        cu_seqlens_q=torch.arange(rows + 1, device=DEVICE, dtype=torch.int32),
    )
    how: dict[str, Any] = dict(
        max_seqlen_q=1, softmax_scale=0.1, causal=True, return_softmax_lse=True
    )
    return lambda: flash_attn_with_kvcache(**arguments, **how)


def chain(model: Heads, batch: int, width: int) -> Callable[[], Any]:
    tokens, heads = batch * width, model.heads // DCP
    of_heads = (model.v, model.qk) if model.latent else (model.qk,)
    q, *q_rope = (rows_of(tokens, heads, dim) for dim in of_heads)
    k, *k_rope = (rows_of(tokens, 1, dim) for dim in of_heads)
    chains = Chains(q, k, rows_of(tokens, 1, model.v), *q_rope, *k_rope)
    prefix = rows_of(tokens, heads, model.v)
    lse = torch.randn(tokens, heads, device=DEVICE)
    sizes = ChainSizes(width, 0.1, 0, model.heads, is_lse_base_on_e=True)
    return lambda: attend_chains(chains, prefix, lse, sizes)


def microseconds(
    call: Callable[[], Any], repeats: int = 5, *, calls: int = CALLS
) -> float:
    """Return the median over `repeats` replays of a graph of so many calls."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1000 / calls)
    return statistics.median(times[1:])


def measure(model: Heads, keys: Keys, batch: int, width: int) -> list[float]:
    calls = (
        attention(model, keys, batch, model.heads),
        attention(model, keys, batch * width, model.heads),
        attention(model, keys, batch, model.heads * width),
        chain(model, batch, width),
    )
    return [microseconds(call) for call in calls]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    numbers = {
        "--contexts": [4096, 65536, 524288],
        "--batches": [1, 8],
        "--widths": [2, 4],
        "--page-sizes": [1],
    }
    for flag, default in numbers.items():
        parser.add_argument(flag, nargs="+", type=int, default=default)
    given = parser.parse_args(arguments)
    titles = ("model", "page", "context", "batch", "width")
    print(*titles, "decode", "rows", "folded", "chain", sep=",")
    every = (given.models, given.page_sizes, given.contexts, given.batches)
    for name, page, context, batch in itertools.product(*every):
        model = heads_of(name)
        keys = make_keys(model, context, batch, page)
        for width in given.widths:
            times = [f"{us:.1f}" for us in measure(model, keys, batch, width)]
            print(name, page, context, batch, width, *times, sep=",", flush=True)


if __name__ == "__main__":
    main()
