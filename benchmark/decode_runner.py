"""SGLang's model runner outside a scheduler, with the arguments of a layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from decode_layouts import Layout


def server_args(options: argparse.Namespace, layout: Layout, model: Path) -> Any:
    """Resolved arguments of the layout's engine."""
    # After the plugins: with this package, the class that knows the DCP flags.
    from sglang.srt import server_args as sglang_args

    more = _dcp_arguments(layout)
    if options.device == "cpu":
        more["disable_cuda_graph"] = True
    else:
        more["cuda_graph_bs_decode"] = sorted(set(options.batches))
    return sglang_args.ServerArgs(
        model_path=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
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
        **more,
    )


def _dcp_arguments(layout: Layout) -> dict[str, Any]:
    if layout.dcp_size == 1:
        return {}
    if layout.is_upstream:
        return {"dcp_size": layout.dcp_size}
    return {
        "dcp_size": layout.dcp_size,
        "dcp_comm_backend": layout.comm,
        "dcp_replicate_q_proj": layout.q == "replicated",
    }


def stop_fused_write() -> None:
    """In a rank of SGLang's own DCP: K/V is written by the attention backend.

    Qwen3-MoE's fused rotary embedding and write takes logical slots for rows of the rank's
    pool, which has a DCP-th of them, and writes past its end.
    """
    from sglang.srt.models import qwen3_moe, utils

    for module in (utils, qwen3_moe):
        module.enable_fused_set_kv_buffer = lambda forward_batch: False


def parallel_state(args: Any, rank: int) -> Any:
    """What a scheduler tells the runner of its place.

    `args.dcp_size` is of SGLang's own DCP; beside this package it is 1.
    """
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState

    return ParallelState.trivial(
        tp_rank=rank,
        tp_size=args.tp_size,
        attn_tp_rank=rank,
        attn_tp_size=args.tp_size,
        gpu_id=rank,
        dp_rank=None,
        moe_dp_rank=None,
        dcp_size=args.dcp_size,
    )


def model_runner(args: Any, nccl_port: int, rank: int) -> Any:
    """SGLang's runner with pools and graphs, made as a scheduler makes it."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.managers import scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    # The hook that publishes the DCP context is on this function.
    scheduler.configure_scheduler_process(args, rank, rank, 0, 0, 0, 0, None)
    for initialize in (
        initialize_moe_config,
        initialize_fp8_gemm_config,
        initialize_fp4_gemm_config,
    ):
        initialize(args)
    runner = ModelRunner(
        model_config=ModelConfig.from_server_args(args),
        mem_fraction_static=args.mem_fraction_static,
        gpu_id=rank,
        ps=parallel_state(args, rank),
        nccl_port=nccl_port,
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner
