"""How fast a GPU does the parts of a prefill: the table behind the choice of a form.

docs/tuning.md says from which measured times the rates follow, and how to take those times
on other GPUs.
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Rates of one GPU. FLOPs count a multiplication and its addition as two.

    Attributes
    ----------
    absorbed_flops : FLOP/s of attention to latents, whose keys are split over SMs
    expanded_flops : FLOP/s of attention to expanded keys, or to K/V heads
    tile_flops : FLOP/s of one SM at the same, while others have no work
    gemm_flops : FLOP/s of the products that expand latents or absorb queries
    step_flops : FLOP/s of attention in a captured decode step, query heads in whole tiles
    memory_bytes : bytes/s of the GPU's memory
    reread_bytes : bytes/s of keys that several rows of a decode step read
    gather_bytes : bytes/s that a rank receives in an all-gather
    exchange_bytes : bytes/s that a rank receives in an exchange of partial outputs
    expanded_tile : query rows of a tile of attention to expanded keys, or to K/V heads
    absorbed_tile : the same of attention to latents, and in a decode step
    in_place_host_s : seconds of launches that a layer adds to keep a prefix in place
    gather_host_s : seconds of launches that a layer adds to gather latents once
    chunk_host_s : seconds of launches that each further prefix chunk adds
    layer_host_s : seconds of launches of a layer in plain TP, in a prefill graph
    eager_layer_host_s : seconds of launches of a layer without a graph, beside those of its
        form
    layer_token_s : seconds of the GPU that a layer takes for a new token beside attention
    chain_s : seconds of the GPU that a layer takes for the new tokens of a chain among
        themselves
    kv_in_place_host_s, kv_gather_host_s : seconds of launches that a layer adds for a prefix
        of K/V heads, in place and gathered
    """

    absorbed_flops: float
    expanded_flops: float
    tile_flops: float
    gemm_flops: float
    step_flops: float
    memory_bytes: float
    reread_bytes: float
    gather_bytes: float
    exchange_bytes: float
    expanded_tile: int
    absorbed_tile: int
    in_place_host_s: float
    gather_host_s: float
    chunk_host_s: float
    layer_host_s: float
    eager_layer_host_s: float
    layer_token_s: float
    chain_s: float
    kv_in_place_host_s: float
    kv_gather_host_s: float


# What the GPU does follows from kernels timed alone on one H200, FA3, bf16 (docs/tuning.md):
# - attention, products and a tile alone: a prefix of 8192 to 524,288 positions and 16 to 8192
#   new tokens, of DeepSeek-V2-Lite's and Qwen3-30B-A3B/4's dimensions. A tile alone had 6.6
#   TFLOP/s and 5.9;
# - steps: 8 to 64 tokens on 32,768 to 524,288 positions, by differences between lengths. The
#   tokens of a chain among themselves took 3 to 5 us for K/V heads and 7 to 16 us for latents,
#   and the rate lies between.
# Launches follow from first-token times of DeepSeek-V2-Lite's dimensions on 2 H200, by
# differences between lengths:
# - host: turns of 64 tokens over 2048 and 32,768 tokens in place, and 64 requests of
#   32,768 tokens gathered, each against plain TP.
# - a layer without a graph: turns of 1, 16 and 64 tokens on 32,768 positions in place, and the
#   same turns as decode steps. The difference, divided by 27 layers, has the launches of a
#   layer and what the form adds, less the step's GPU work. A turn of 1 token on K/V heads,
#   gathered, gives one more value. The smallest of the four is 2.65 ms. Longer prefixes and
#   an earlier day's servers gave less, so the rate is 1.5 ms.
# Not measured, but taken from the datasheet (4.8 TB/s, 450 GB/s each way): memory at 5/6,
# links at 7/9 and 2/3.
# Of K/V heads (Qwen3-30B-A3B/4, 48 layers, 2 H200, tp 2, fa3, prefill graphs):
# - layer: a traced chunk of 8192 tokens in plain TP. The host took 32 ms, and the GPU 45.6 ms
#   beside attention.
# - in place: a turn of 100 tokens on 30,720 positions, 54 ms more than plain TP.
# - gathered: not measured, but scaled by launches. In place a layer has 4 launches
#   more than plain TP without a prefix, and 10 more with one. The 4 take 0.1 ms by the host
#   times of traces, so the 10 take 1.0 ms. Gathered has the 4 and 2 more: one that joins the
#   splits of attention, and a layer's share of the gather.
HOPPER = Rates(
    absorbed_flops=620e12,
    expanded_flops=650e12,
    tile_flops=6.2e12,
    gemm_flops=350e12,
    step_flops=600e12,
    memory_bytes=4.0e12,
    reread_bytes=7.6e12,
    gather_bytes=350e9,
    exchange_bytes=300e9,
    expanded_tile=128,
    absorbed_tile=64,
    in_place_host_s=1.2e-3,
    gather_host_s=0.5e-3,
    chunk_host_s=0.6e-3,
    layer_host_s=0.67e-3,
    eager_layer_host_s=1.5e-3,
    layer_token_s=0.116e-6,
    chain_s=10e-6,
    kv_in_place_host_s=1.1e-3,
    kv_gather_host_s=0.3e-3,
)
