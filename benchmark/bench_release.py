"""What the benchmarks do otherwise by SGLang release: arguments, groups, runner, batch.

SGLang 0.5.21 and later keep sizes and ranks in one context of the process, which is
published before anything else, and give a batch its slots by a plan. This module must not
import this package: it is also used by ranks of SGLang's own DCP.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

# The first release with a published context.
_PUBLISHED = (0, 5, 21)
# What groups are made of, beside the sizes of `init_groups`.
_NOT_SPLIT: dict[str, Any] = {
    "pp_size": 1,
    "attn_cp_size": 1,
    "attn_dp_size": 1,
    "moe_dp_size": 1,
    "moe_ep_size": 1,
    "shared_experts_tp_size": None,
}


def publishes() -> bool:
    """Whether the installed SGLang has a published context."""
    numbers = re.findall(r"\d+", version("sglang"))[:3]
    return tuple(map(int, numbers)) >= _PUBLISHED


def resolved(args: Any) -> Any:
    """Resolve `args` where the constructor did not; return a view of what came out."""
    if not publishes():
        return args
    from sglang.srt.arg_groups.overrides import resolving_view

    args.resolve_once()
    return resolving_view(args)


def init_groups(tp_size: int, dcp_size: int) -> None:
    """Make SGLang's groups in an initialised world, its own DCP group among them."""
    from sglang.srt.distributed import parallel_state

    if not publishes():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size, decode_context_parallel_size=dcp_size
        )
        return
    from sglang.srt.runtime_context import get_parallel

    get_parallel().override_permanently(
        tp_size=tp_size,
        attn_tp_size=tp_size,
        moe_tp_size=tp_size,
        dcp_size=dcp_size,
        attn_dcp_size=dcp_size,
        dcp_enabled=dcp_size > 1,
        **_NOT_SPLIT,
    )
    parallel_state.initialize_model_parallel()


def own_dcp_group() -> Any:
    """The group that SGLang made for its own DCP."""
    from sglang.srt.distributed import parallel_state

    return parallel_state.get_dcp_group()


def tp_group() -> Any:
    """SGLang's group of all tensor-parallel ranks."""
    from sglang.srt.distributed import parallel_state

    return parallel_state.get_tp_group()


def import_runner() -> None:
    """Import what takes a rank long, before the GPUs are its own."""
    from sglang.srt.managers import scheduler  # noqa: F401
    from sglang.srt.model_executor import model_runner  # noqa: F401


def enter_scheduler(args: Any, rank: int) -> None:
    """Configure this process as a scheduler's, of `rank` and on the GPU of that number."""
    from sglang.srt.managers import scheduler

    # The hook that publishes the DCP context is on this function.
    if not publishes():
        scheduler.configure_scheduler_process(args, rank, rank, 0, 0, 0, 0, None)
        return
    from sglang.srt.runtime_context import SpawnRanks, publish

    ranks = SpawnRanks(world_rank=rank, gpu_id=rank)
    publish(args, role="scheduler", ranks=ranks)
    scheduler.configure_scheduler_process(args, rank)


def initialize_kernels(args: Any) -> None:
    """Choose the kernels of experts and GEMMs, as a scheduler does."""
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config

    given = () if publishes() else (args,)
    initialize_moe_config(*given)
    initialize_fp8_gemm_config(*given)
    initialize_fp4_gemm_config(*given)
    if publishes():
        from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config

        initialize_bf16_gemm_config()


def new_runner(args: Any, nccl_port: int, rank: int) -> Any:
    """SGLang's model runner with groups and weights, without pools."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    config = ModelConfig.from_server_args(args)
    place: dict[str, Any] = {}
    if publishes():
        from sglang.srt.distributed import bootstrap

        bootstrap.init_parallel_runtime(
            server_args=args, device=resolved(args).device, dist_port=nccl_port
        )
        bootstrap.init_layer_runtime(model_config=config)
    else:
        place["ps"] = parallel_state(args, rank)
    initialize_kernels(args)
    return ModelRunner(
        model_config=config,
        mem_fraction_static=resolved(args).mem_fraction_static,
        gpu_id=rank,
        nccl_port=nccl_port,
        server_args=args,
        **place,
    )


def parallel_state(args: Any, rank: int) -> Any:
    """What a scheduler of 0.5.16 tells the runner of its place.

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


def new_batch(runner: Any, fields: dict[str, Any]) -> Any:
    """SGLang's `ForwardBatch` of these fields, which name slots as the allocator does."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    if not publishes():
        tokens = len(fields["input_ids"])
        return ForwardBatch(num_token_non_padded_cpu=tokens, **fields)
    batch = ForwardBatch(**fields)
    batch._init_num_token_non_padded(device=runner.device, is_draft_worker=False)
    translator = runner.kv_index_translator
    translator.own_plan(batch).bind(batch, translator)
    return batch
