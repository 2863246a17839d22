"""What attention with DCP may take beside the KV pool: read from SGLang's `ModelRunner`.

The pool is not made smaller for it. SGLang sizes the pool so that `1 - mem_fraction_static`
of the memory stays free, and chooses that fraction for activations: 1.5 MB for each token
of a prefill chunk, and at least 10 GB on GPUs of more than 60 GB. The tensors here are
activations, and grow with the same chunk. Counting them again would take the room twice.
Slot tables are none, so those are counted (`table_memory`). Instead the log says the
number, and warns where less is left.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple, Optional

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import get_context
from sglang_dcp.layers.decode_memory import decode_parts
from sglang_dcp.layers.forward_memory import prefill_parts
from sglang_dcp.layers.forward_sizes import Expansion, ForwardSizes, Parts
from sglang_dcp.layers.heads import is_mla, kv_head_counts
from sglang_dcp.layers.kv_prefill import kv_sizes_of
from sglang_dcp.layers.mla import groups
from sglang_dcp.layers.mla.form import MHA_HEAD_DIMS
from sglang_dcp.layers.workspace import most_requests, tokens_per_request
from sglang_dcp.ops.layout import most_kept_kv_heads
from sglang_dcp.releases.api import sglang_api

logger = logging.getLogger(__name__)

_SHOWN_PARTS = 3


class ForwardMemory(NamedTuple):
    """Bytes that attention takes on a GPU beside the KV pool, at most.

    Attributes
    ----------
    standing : of inboxes and of captured decode steps, which are held all the time
    forward : of the largest eager forward, by what they hold
    what : that forward, in words
    """

    standing: Parts
    forward: Parts
    what: str

    @property
    def forward_bytes(self) -> int:
        return sum(self.forward.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.standing.values()) + self.forward_bytes

    def __str__(self) -> str:
        largest = sorted(self.forward.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {gb(n)}" for name, n in largest[:_SHOWN_PARTS] if n)
        held = "".join(f"{name} {gb(n)}, " for name, n in self.standing.items() if n)
        return (
            f"{gb(self.total_bytes)} GB: {held}{self.what} {gb(self.forward_bytes)} "
            f"({shown})"
        )


def gb(count: float) -> str:
    """Show bytes in GB."""
    return f"{count / 1e9:.2f}"


def admit_prompts(runner: Any, config: DcpConfig, longest: int) -> int:
    """Log what attention may take, and return the longest prompt that may be accepted.

    Only without chunked prefill does a prompt's length decide what its prefill takes.
    Then all ranks call this together: it takes the least free memory of all GPUs.

    Parameters
    ----------
    longest : int
        Tokens of the longest prompt that the KV pool can hold.
    """
    sizes = forward_sizes(runner, config)
    if is_chunked(sglang_api().resolved(runner.server_args)):
        free = free_bytes(runner) if get_context().tp_rank == 0 else None
    else:
        free = least_free_bytes(runner)
        if free is not None:
            longest = longest_that_fits(sizes, longest, free)
    memory = forward_memory(runner, sizes, longest)
    runner.dcp_forward_memory = memory.total_bytes
    if get_context().tp_rank == 0:
        logger.info("DCP: attention may take beside the KV pool: %s", memory)
        if free is not None:
            _warn_unless_fitting(runner, memory, free)
    return longest


def is_chunked(args: Any) -> bool:
    """Whether SGLang cuts prompts into prefill chunks. `args` are resolved."""
    chunk = args.chunked_prefill_size
    return chunk is not None and chunk > 0


def longest_that_fits(sizes: ForwardSizes, longest: int, free: int) -> int:
    """Return the most tokens, up to `longest`, whose prefill takes at most `free` bytes."""

    def fits(tokens: int) -> bool:
        return sum(prefill_parts(sizes, tokens).values()) <= free

    if fits(longest):
        return longest
    most, above = 0, longest
    while above - most > 1:
        middle = (most + above) // 2
        if fits(middle):
            most = middle
        else:
            above = middle
    return most


def forward_memory(runner: Any, sizes: ForwardSizes, longest: int) -> ForwardMemory:
    """Compute the memory of a rank whose longest prompt has `longest` tokens."""
    args = sglang_api().resolved(runner.server_args)
    tokens = max(longest, args.max_prefill_tokens)
    if is_chunked(args):
        tokens = args.chunked_prefill_size
    requests = most_requests(runner, get_context().config)
    prefill, decode = prefill_parts(sizes, tokens), decode_parts(sizes, requests)
    forward, what = prefill, f"a prefill of {tokens} tokens"
    if sum(decode.values()) > sum(prefill.values()):
        forward, what = decode, f"{_decode_words(sizes, requests)} without a CUDA graph"
    captured = decode_parts(sizes, captured_requests(args), captured=True)
    standing = {
        "inboxes": runner.attn_backend.exchange.standing_bytes,
        "captured decode steps": sum(captured.values()),
    }
    return ForwardMemory(standing, forward, what)


def _decode_words(sizes: ForwardSizes, requests: int) -> str:
    words = f"a decode step of {requests} requests"
    return words if sizes.width == 1 else f"{words} x {sizes.width} query tokens"


def captured_requests(args: Any) -> int:
    """Return the most requests of a captured decode step; 0 without CUDA graphs."""
    from sglang.srt.model_executor.cuda_graph_config import Backend

    decode = args.cuda_graph_config.decode
    if args.device == "cpu" or decode.backend == Backend.DISABLED:
        return 0
    return int(decode.max_bs or 0)


def forward_sizes(runner: Any, config: DcpConfig) -> ForwardSizes:
    """Read the sizes of a rank's attention."""
    model, args = runner.model_config, sglang_api().resolved(runner.server_args)
    heads, latent = model.num_attention_heads // config.tp_size, is_mla(model)
    kv_heads, qk_dim, v_dim = 1, model.head_dim, model.v_head_dim
    if latent:
        qk_dim = model.kv_lora_rank + model.qk_rope_head_dim
        v_dim = model.kv_lora_rank
    else:
        kv_heads = config.layout.kv_heads_per_rank(kv_head_counts(model)[0])
    kv_sizes = kv_sizes_of(runner, config)
    inner = runner.attn_backend.backend
    return ForwardSizes(
        backend=args.attention_backend,
        heads=heads,
        dcp_size=config.dcp_size,
        kv_heads=kv_heads,
        kept_kv_heads=most_kept_kv_heads(heads, kv_heads, config.dcp_size),
        qk_dim=qk_dim,
        v_dim=v_dim,
        itemsize=runner.dtype.itemsize,
        stored_itemsize=runner.token_to_kv_pool.dtype.itemsize,
        latent=latent,
        replicated_q=config.replicate_q_proj,
        gathers_lse=config.comm_backend == "ag_rs",
        splits=not args.enable_deterministic_inference,
        planned_outputs=inner.planned_outputs,
        expansion=_expansion(model, args) if latent else None,
        has_prefix=may_have_prefix(args),
        gathered=kv_sizes.most_positions if kv_sizes else 0,
        width=tokens_per_request(runner.server_args),
        head_tile=inner.head_tile,
    )


def may_have_prefix(args: Any) -> bool:
    """Whether a prefill may find K/V of its request in the pool.

    Chunks before it, the radix cache and streaming sessions put K/V there. `args` are
    resolved.
    """
    keeps = not args.disable_radix_cache or args.enable_streaming_session
    return bool(is_chunked(args) or keeps)


def _expansion(model: Any, args: Any) -> Optional[Expansion]:
    """Return the expanded form of MLA over a prefix, or None where there is none."""
    from sglang.srt.environ import envs

    nope, rope = model.qk_nope_head_dim, model.qk_rope_head_dim
    if (nope + rope, model.v_head_dim) != MHA_HEAD_DIMS:
        return None
    absorbed = args.attention_backend == "flashinfer" and (
        args.flashinfer_mla_disable_ragged
    )
    if (
        args.attention_backend not in ("fa3", "flashinfer")
        or absorbed
        or args.disable_chunked_prefix_cache
    ):
        return None
    positions = envs.SGLANG_MAX_KV_CHUNK_CAPACITY.get()
    by_group = args.attention_backend in groups.SERVED
    return Expansion(
        model.kv_lora_rank,
        *(rope, nope, model.v_head_dim),
        positions,
        groups.MOST_IN_PLACE_TOKENS if by_group else 0,
    )


def free_bytes(runner: Any) -> Optional[int]:
    """Return what is free on this rank's GPU; None on a CPU."""
    return _free_bytes(runner, {})


def least_free_bytes(runner: Any) -> Optional[int]:
    """Return the least that is free on any GPU. A collective over all ranks.

    None on a CPU.
    """
    from sglang.srt.distributed.parallel_state import get_world_group

    group = get_world_group().cpu_group
    return _free_bytes(runner, {"distributed": True, "cpu_group": group})


def _free_bytes(runner: Any, more: dict[str, Any]) -> Optional[int]:
    from sglang.srt.utils.common import get_available_gpu_memory

    if runner.device == "cpu":
        return None
    return int(get_available_gpu_memory(runner.device, runner.gpu_id, **more) * 2**30)


def _warn_unless_fitting(runner: Any, memory: ForwardMemory, free: int) -> None:
    """Warn if an eager forward may take more than is free. SGLang's own part comes on top."""
    missing = memory.forward_bytes - free
    if missing <= 0:
        return
    fraction = sglang_api().resolved(runner.server_args).mem_fraction_static
    whole = runner.pre_model_load_memory * 2**30
    logger.warning(
        "DCP: attention of %s may take %s GB, and %s GB are free; use a smaller "
        "--chunked-prefill-size or --max-running-requests, or --mem-fraction-static %.3f "
        "at most (it is %.3f)",
        memory.what,
        gb(memory.forward_bytes),
        gb(free),
        fraction_that_fits(fraction, missing / whole),
        fraction,
    )


def fraction_that_fits(fraction: float, missing: float) -> float:
    """Lower `--mem-fraction-static` by the part `missing`, to three digits; at least 0."""
    # Floats like 0.8 - 0.1 may lie just below the digits that they mean.
    return max(0.0, math.floor((fraction - missing) * 1000 + 1e-6) / 1000)
