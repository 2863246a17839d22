"""SGLang's model runner outside a scheduler, with the arguments of a layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import bench_release
from decode_dummies import fp8_dummies
from decode_layouts import Layout
from decode_memory import weight_bytes
from decode_quantization import flag_value


def server_args(options: argparse.Namespace, layout: Layout, model: Path) -> Any:
    """Resolved arguments of the layout's engine.

    Raises
    ------
    ValueError
        If they cannot be served; with DCP of this package a `DcpConfigError`.
    """
    # After the plugins: with this package, the class that knows the DCP flags.
    from sglang.srt import server_args as sglang_args

    more = _dcp_arguments(layout)
    if options.device == "cpu":
        more["disable_cuda_graph"] = True
    else:
        more["cuda_graph_bs_decode"] = sorted(set(options.batches))
    args = sglang_args.ServerArgs(
        model_path=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        quantization=flag_value(options.quantization),
        device=options.device,
        tp_size=options.tp,
        attention_backend=layout.attention,
        kv_cache_dtype=options.kv_cache_dtype,
        page_size=options.page_size,
        mem_fraction_static=options.mem_fraction,
        max_total_tokens=options.max_total_tokens,
        max_running_requests=max(options.batches),
        disable_prefill_cuda_graph=True,
        disable_radix_cache=True,
        sampling_backend="pytorch",
        random_seed=0,
        log_level="warning",
        # It tunes FlashInfer's experts and GEMMs, which no model here uses.
        disable_flashinfer_autotune=True,
        **more,
    )
    bench_release.resolved(args)
    return args


def _dcp_arguments(layout: Layout) -> dict[str, Any]:
    if layout.dcp_size == 1:
        return {}
    if layout.is_upstream:
        # Its comm backend is its own choice.
        return {"dcp_size": layout.dcp_size, **_replicated(layout)}
    return {
        "dcp_size": layout.dcp_size,
        "dcp_comm_backend": layout.comm,
        "dcp_replicate_q_proj": layout.q == "replicated",
    }


def _replicated(layout: Layout) -> dict[str, bool]:
    return {"dcp_replicate_q_proj": True} if layout.q == "replicated" else {}


def stop_fused_write() -> None:
    """In a rank of SGLang's own DCP: K/V is written by the attention backend.

    Qwen3-MoE's fused rotary embedding and write takes logical slots for rows of the rank's
    pool, which has a DCP-th of them, and writes past its end.
    """
    from sglang.srt.models import qwen3_moe, utils

    for module in (utils, qwen3_moe):
        module.enable_fused_set_kv_buffer = lambda forward_batch: False


def model_runner(args: Any, nccl_port: int, rank: int) -> tuple[Any, int]:
    """SGLang's runner with pools and graphs, made as a scheduler makes it.

    Returns
    -------
    runner
    int
        Bytes of the weights of this rank.
    """
    bench_release.enter_scheduler(args, rank)
    with fp8_dummies():
        runner = bench_release.new_runner(args, nccl_port, rank)
    # Before there are pools and workspaces.
    weights = weight_bytes(runner.model, args.device)
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner, weights
