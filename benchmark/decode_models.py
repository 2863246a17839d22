"""Models and engines of `bench_decode.py`.

Dimensions are those of the published config.json files.

Weights are dummies, so what only changes their use is left out: the rotary embedding is
plain (no yarn or llama3 scaling) and as long as the benchmark's longest context.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Optional

_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
}
_QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
_DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "vocab_size": 102400,
    "rope_theta": 10000.0,
}
_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "Qwen2.5-7B": _QWEN2_5_7B,
    "Llama-3.1-8B": _LLAMA_3_1_8B,
    "DeepSeek-V2-Lite": _DEEPSEEK_V2_LITE,
}


def vocab_size(model: str) -> int:
    """Number of token ids of a model of `MODELS`."""
    return int(MODELS[model]["vocab_size"])


def write_model(folder: Path, model: str, context_length: int) -> Path:
    """Write config.json for `--load-format dummy` into `folder` and return `folder`."""
    config = {**_COMMON, **MODELS[model], "max_position_embeddings": context_length}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


class Layout(NamedTuple):
    """How attention is laid out over the ranks; KVP 1 is SGLang without DCP."""

    name: str = "tp"
    kvp: int = 1
    comm: str = "-"
    q: str = "-"

    @classmethod
    def parse(cls, text: str) -> Layout:
        kvp, comm, *rest = text.split(":")
        if rest not in ([], ["q"]):
            raise ValueError(text)
        return cls(text, int(kvp), comm, "replicated" if rest else "gathered")


class Row(NamedTuple):
    """One line of the CSV; times are None where the size does not fit the pool."""

    layout: Layout
    batch: int
    context: int
    pool_tokens: int  # of the whole layout
    pool_tokens_rank: int  # held by one rank
    status: str
    median_ms: Optional[float] = None
    p95_ms: Optional[float] = None
    host_ms: Optional[float] = None

    def __str__(self) -> str:
        size = f"context {self.context:>7} batch {self.batch:>3}: "
        if self.median_ms is None:
            return size + self.status
        return size + (
            f"{self.median_ms:.3f} ms, p95 {self.p95_ms:.3f}, "
            f"host {self.host_ms:.3f}, pool {self.pool_tokens}"
        )


def server_args(options: argparse.Namespace, layout: Layout, model: Path) -> Any:
    """Resolved arguments of the layout's engine."""
    from sglang_dcp.server_args import DcpServerArgs

    dcp: dict[str, Any] = {}
    if layout.kvp > 1:
        dcp = {
            "dcp_size": layout.kvp,
            "dcp_comm_backend": layout.comm,
            "dcp_replicate_q_proj": layout.q == "replicated",
        }
    return DcpServerArgs(
        model_path=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        tp_size=options.tp,
        attention_backend=options.attention_backend,
        page_size=options.page_size,
        mem_fraction_static=options.mem_fraction,
        max_running_requests=max(options.batches),
        cuda_graph_bs_decode=sorted(options.batches),
        disable_prefill_cuda_graph=True,
        disable_radix_cache=True,
        sampling_backend="pytorch",
        random_seed=0,
        log_level="warning",
        **dcp,
    )


def model_runner(args: Any, nccl_port: int, rank: int) -> Any:
    """SGLang's runner with pools and graphs, made as a scheduler makes it."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.managers import scheduler
    from sglang.srt.model_executor.model_runner import ModelRunner

    # The seam that publishes the DCP context is on this function.
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
        ps=ParallelState(
            **{"tp_rank": rank, "tp_size": args.tp_size, "pp_rank": 0, "pp_size": 1},
            **{"dp_rank": None, "dp_size": 1, "gpu_id": rank, "dcp_size": 1},
            **{"attn_tp_rank": rank, "attn_tp_size": args.tp_size},
            **{"attn_cp_rank": 0, "attn_cp_size": 1},
            **{"attn_dp_rank": 0, "attn_dp_size": 1},
            **{"moe_ep_rank": 0, "moe_ep_size": 1},
            **{"moe_dp_rank": None, "moe_dp_size": 1},
        ),
        nccl_port=nccl_port,
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def run_layout(
    run_rank: Callable[..., None],
    options: argparse.Namespace,
    layout: Layout,
    model: Path,
) -> Iterator[Any]:
    """What rank 0 of the layout's engine sends; the ranks live meanwhile.

    `run_rank(options, layout, server arguments, NCCL port, rank, connection)` is a rank;
    the first one sends None at its end.

    Raises
    ------
    RuntimeError
        If a rank ended before that.
    """
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.server_args import PortArgs

    args = server_args(options, layout, model)
    _set_envs_and_config(args)
    port = PortArgs.init_new(args).nccl_port
    spawn = mp.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    ranks = [
        spawn.Process(target=run_rank, args=(options, layout, args, port, rank, sender))
        for rank in range(options.tp)
    ]
    for rank in ranks:
        rank.start()
    try:
        while True:
            ready = wait([receiver, *(rank.sentinel for rank in ranks)])
            if receiver not in ready:
                codes = [rank.exitcode for rank in ranks]
                raise RuntimeError(f"{layout.name}: a rank ended, exit codes {codes}")
            message = receiver.recv()
            if message is None:
                return
            yield message
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()
