"""The one table of places where this package meets SGLang.

Every seam is one function of ours with one call site in SGLang. The plugin reaches it
through SGLang's hook registry, or, where that cannot (dict entries, Triton kernels,
class attributes), by an assignment. A fork can write the same call into its source.

Each function hands over to SGLang's own where DCP is off.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """How a seam is put in place."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"
    ATTRIBUTE = "attribute"  # target is an attribute path, set to our object
    ENTRY = "entry"  # target is `module.MAPPING[key]`, set to our object


@dataclass(frozen=True)
class Seam:
    """One meeting point.

    Attributes
    ----------
    name : str
        Subject, unique.
    target : str
        Dotted path in SGLang; `path[key]` for a mapping entry.
    kind : Kind
    ours : str
        `module:attribute` of this package, imported when the seam is put in place.
    why : str
        What goes wrong without it.
    """

    name: str
    target: str
    kind: Kind
    ours: str
    why: str

    @property
    def module(self) -> str:
        """SGLang module whose file holds the target."""
        path = self.target.split("[")[0]
        while True:
            try:
                importlib.import_module(path)
                return path
            except ModuleNotFoundError:
                path, dot, _ = path.rpartition(".")
                if not dot:
                    raise

    def load(self) -> Any:
        """Our object."""
        return pkgutil.resolve_name(self.ours)


_SRT = "sglang.srt"

SEAMS: tuple[Seam, ...] = (
    (
        Seam(
            "server-args",
            f"{_SRT}.server_args.ServerArgs",
            Kind.REPLACE,
            "sglang_dcp.server_args:DcpServerArgs",
            "the flags, their rules, and logical pages for everything that schedules",
        ),
        Seam(
            "engine-server-args",
            f"{_SRT}.entrypoints.engine.Engine.server_args_class",
            Kind.ATTRIBUTE,
            "sglang_dcp.server_args:DcpServerArgs",
            "Engine keeps the class in an attribute that no hook reaches",
        ),
        Seam(
            "scheduler-process",
            f"{_SRT}.managers.scheduler.configure_scheduler_process",
            Kind.BEFORE,
            "sglang_dcp.process:configure_scheduler_process",
            "each scheduler proves its seams and learns its place in the layout",
        ),
        Seam(
            "groups-init",
            f"{_SRT}.distributed.parallel_state.initialize_model_parallel",
            Kind.AFTER,
            "sglang_dcp.process:initialize_model_parallel",
            "_KVP and _ATTN_TP are made with the other groups",
        ),
        Seam(
            "groups-destroy",
            f"{_SRT}.distributed.parallel_state.destroy_model_parallel",
            Kind.BEFORE,
            "sglang_dcp.process:destroy_model_parallel",
            "_KVP and _ATTN_TP end with the other groups",
        ),
        Seam(
            "groups-capture",
            f"{_SRT}.distributed.parallel_state.graph_capture",
            Kind.AROUND,
            "sglang_dcp.distributed.groups:graph_capture_with_dcp",
            "collectives inside a CUDA graph need the group in capture mode",
        ),
        Seam(
            "all-to-all-group",
            f"{_SRT}.distributed.parallel_state.GroupCoordinator.all_to_all_single",
            Kind.AROUND,
            "sglang_dcp.process:group_all_to_all_single",
            "for other users: 0.5.16 has torch.distributed on CUDA alone, not CPU or graphs",
        ),
        Seam(
            "all-to-all-pynccl",
            f"{_SRT}.distributed.device_communicators.pynccl"
            ".PyNcclCommunicator.all_to_all_single",
            Kind.ATTRIBUTE,
            "sglang_dcp.distributed.all_to_all:pynccl_all_to_all_single",
            "for other users: 0.5.16 has no such method",
        ),
        Seam(
            "kv-heads-config",
            f"{_SRT}.configs.model_config.ModelConfig.from_server_args",
            Kind.AROUND,
            "sglang_dcp.layers.heads:model_config_from_server_args",
            "model, pool and backend read the KV-head count from here",
        ),
        Seam(
            "kv-heads-weights",
            f"{_SRT}.layers.linear.QKVParallelLinear.__init__",
            Kind.AROUND,
            "sglang_dcp.layers.heads:qkv_parallel_linear_init",
            "ranks of one KVP group load the same K/V heads",
        ),
        Seam(
            "kv-pool-budget",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator"
            ".config_from_budget",
            Kind.AFTER,
            "sglang_dcp.layers.kv_pool:config_from_budget",
            "the scheduler counts logical tokens: KVP x what one rank holds",
        ),
        Seam(
            "kv-pool-input-bound",
            f"{_SRT}.managers.tp_worker.TpModelWorker.get_worker_info",
            Kind.AFTER,
            "sglang_dcp.layers.kv_pool:bound_input",
            "a prompt that fills the pool would wait for ever, and what comes after it",
        ),
        Seam(
            "kv-pool-mha",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:build_kv_pool",
            "a rank's pool holds only the positions that it owns",
        ),
        Seam(
            "kv-pool-mla",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mla_kv_pool",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:build_kv_pool",
            "a rank's pool holds only the positions that it owns",
        ),
        Seam(
            "fused-kv-write",
            f"{_SRT}.models.utils.enable_fused_set_kv_buffer",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:enable_fused_set_kv_buffer",
            "the fused RoPE kernel writes logical slots into a rank's pool",
        ),
        Seam(
            "mla-torch-native",
            f"{_SRT}.models.deepseek_common.attention_backend_handler"
            ".AttentionBackendRegistry._handlers[torch_native]",
            Kind.ENTRY,
            "sglang_dcp.layers.adaptors.torch_native:mla_forward_method",
            "prefill would expand the latent to heads and write it to logical slots",
        ),
        *(
            Seam(
                f"mla-{name}",
                f"{_SRT}.models.deepseek_common.attention_backend_handler"
                f".AttentionBackendRegistry._handlers[{name}]",
                Kind.ENTRY,
                f"sglang_dcp.layers.mla_method:mla_forward_method_{name}",
                "a long prefix would be gathered where exchanging queries is less, and uncut",
            )
            for name in ("fa3", "flashinfer")
        ),
        *(
            Seam(
                f"mla-latents-{verb}",
                f"{_SRT}.models.deepseek_common.attention_forward_methods.forward_mha"
                f".DeepseekMHAForwardMixin._{verb}_mla_kv_buffer",
                Kind.AROUND,
                f"sglang_dcp.layers.mla_method:{verb}_mla_kv_buffer",
                f"prefill by MHA would {what} logical slots of a rank's pool",
            )
            for verb, what in (("set", "write"), ("get", "read"))
        ),
        Seam(
            "q-replication",
            f"{_SRT}.model_executor.model_runner.ModelRunner.load_model",
            Kind.AFTER,
            "sglang_dcp.layers.q_replication:after_load_model",
            "--dcp-replicate-q-proj widens the loaded Q projection",
        ),
    )
    + tuple(
        Seam(
            f"attention-{name.replace('_', '-')}",
            f"{_SRT}.layers.attention.attention_registry.ATTENTION_BACKENDS[{name}]",
            Kind.ENTRY,
            f"sglang_dcp.layers.adaptors.registry:{creator}",
            "the DCP-aware RadixAttention",
        )
        for name, creator in (
            ("torch_native", "create_torch_native_backend"),
            ("triton", "create_triton_backend"),
            ("flashinfer", "create_flashinfer_backend"),
            ("fa3", "create_flashattention_v3_backend"),
        )
    )
    + tuple(
        Seam(
            f"q-replication-{source}",
            f"{_SRT}.model_executor.model_runner_components.weight_updater"
            f".WeightUpdater.update_weights_from_{source}",
            Kind.AROUND,
            "sglang_dcp.layers.q_replication:around_weight_update",
            "new weights must reach the widened copy too",
        )
        for source in ("disk", "distributed", "tensor", "ipc")
    )
)

CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        "cpu-rope",
        f"{_SRT}.layers.rotary_embedding.base._is_cpu",
        Kind.ATTRIBUTE,
        "sglang_dcp.cpu:IS_CPU",
        "without a GPU, RotaryEmbedding imports vLLM unless it knows it is on a CPU",
    ),
    Seam(
        "cpu-rope-plain",
        f"{_SRT}.layers.rotary_embedding.factory.get_rope_wrapper",
        Kind.AROUND,
        "sglang_dcp.cpu:get_rope_wrapper",
        "DeepSeek on CPU takes only yarn-scaled rotary embeddings",
    ),
    Seam(
        "cpu-head-padding",
        f"{_SRT}.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        Kind.AROUND,
        "sglang_dcp.cpu:adjust_config_with_unaligned_cpu_tp",
        "pads heads for the AMX engine's loader, which is not in use",
    ),
    Seam(
        "cpu-pynccl",
        f"{_SRT}.distributed.device_communicators.pynccl.PyNcclCommunicator.__init__",
        Kind.AROUND,
        "sglang_dcp.cpu:pynccl_init",
        "a CUDA build of torch ships NCCL, which then asks for a CUDA device",
    ),
    Seam(
        "cpu-thread-binding",
        f"{_SRT}.utils.numa_utils.init_threads_binding",
        Kind.BEFORE,
        "sglang_dcp.cpu:init_threads_binding",
        "more ranks than NUMA nodes need a core list",
    ),
    Seam(
        "cpu-alloc-extend",
        f"{_SRT}.mem_cache.allocator.paged.alloc_extend_kernel",
        Kind.ATTRIBUTE,
        "sglang_dcp.cpu:ALLOC_EXTEND",
        "the paged allocator has only Triton kernels",
    ),
    Seam(
        "cpu-alloc-decode",
        f"{_SRT}.mem_cache.allocator.paged.alloc_decode_kernel",
        Kind.ATTRIBUTE,
        "sglang_dcp.cpu:ALLOC_DECODE",
        "the paged allocator has only Triton kernels",
    ),
)


# Not hooked, but what our adaptors, view and capture were written against.
RELIES_ON: tuple[str, ...] = (
    "kernels/ops/attention/decode_attention.py",
    "kernels/ops/attention/extend_attention.py",
    "kernels/ops/kvcache/kv_indices.py",
    "kernels/ops/kvcache/mla_buffer.py",
    "srt/layers/attention/base_attn_backend.py",
    "srt/layers/attention/flashattention_backend.py",
    "srt/layers/attention/flashinfer_backend.py",
    "srt/layers/attention/triton_backend.py",
    "srt/layers/dcp/comm.py",
    "srt/layers/radix_attention.py",
    "srt/mem_cache/memory_pool.py",
    "srt/model_executor/forward_batch_deepseek_mha_mixin.py",
    "srt/model_executor/forward_batch_info.py",
    "srt/model_executor/runner/decode_cuda_graph_runner.py",
    "srt/model_executor/runner/eager_runner.py",
    "srt/models/deepseek_common/attention_forward_methods/forward_mla.py",
    "srt/models/deepseek_common/utils.py",
    "srt/models/deepseek_v2.py",
    "srt/models/glm4_moe_lite.py",
    "srt/models/llama.py",
    "srt/models/qwen2.py",
    "srt/models/qwen3.py",
    "srt/models/qwen3_moe.py",
)


def active_seams() -> tuple[Seam, ...]:
    """Seams of this machine: the CPU set-up joins where torch sees no accelerator."""
    import torch

    return SEAMS if torch.accelerator.is_available() else SEAMS + CPU_SEAMS
