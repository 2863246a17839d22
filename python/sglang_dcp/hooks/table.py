"""The one table of places where this package meets SGLang.

Every hook is one object of ours at one place in SGLang. The plugin installs it through
SGLang's hook registry. Dict entries, Triton kernels and class attributes need an
assignment, because the registry cannot reach them. A fork can write the same hooks into
its source.

With DCP off, a hook calls SGLang's function unchanged. Keep hooks to one call.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional, Protocol, TypeVar

from sglang_dcp.releases.installed import in_range, sglang_version


class Kind(Enum):
    """How a hook is installed."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"
    ATTRIBUTE = "attribute"  # target is an attribute path, set to our object
    ENTRY = "entry"  # target is `module.MAPPING[key]`, set to our object


@dataclass(frozen=True)
class Hook:
    """One place where this package meets SGLang.

    Attributes
    ----------
    name : str
        Unique name.
    target : str
        Dotted path in SGLang, or `path[key]` for a mapping entry.
    kind : Kind
    ours : str
        `module:attribute` of this package, imported when the hook is installed.
    why : str
        What goes wrong without it.
    since, until : str, optional
        The first release of SGLang with this target, and the first one without it.
    """

    name: str
    target: str
    kind: Kind
    ours: str
    why: str
    since: Optional[str] = None
    until: Optional[str] = None

    @property
    def module(self) -> str:
        """Return the SGLang module whose file holds the target. Imports it."""
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
        """Import and return our object."""
        return pkgutil.resolve_name(self.ours)


_SRT = "sglang.srt"
_UPDATER = f"{_SRT}.model_executor.model_runner_components.weight_updater.WeightUpdater"

HOOKS: tuple[Hook, ...] = (
    (
        Hook(
            "server-args",
            f"{_SRT}.server_args.ServerArgs",
            Kind.REPLACE,
            "sglang_dcp.hooks.dcp_server_args:DcpServerArgs",
            "SGLang would not know the flags, and would schedule by pages of one rank",
        ),
        Hook(
            "engine-server-args",
            f"{_SRT}.entrypoints.engine.Engine.server_args_class",
            Kind.ATTRIBUTE,
            "sglang_dcp.hooks.dcp_server_args:DcpServerArgs",
            "Engine keeps the original class in an attribute and would use it",
        ),
        Hook(
            "scheduler-process",
            f"{_SRT}.managers.scheduler.configure_scheduler_process",
            Kind.BEFORE,
            "sglang_dcp.hooks.scheduler:configure_scheduler_process",
            "a scheduler would not verify its hooks, nor know its rank in the layout",
        ),
        Hook(
            "groups-init",
            f"{_SRT}.distributed.parallel_state.initialize_model_parallel",
            Kind.AFTER,
            "sglang_dcp.hooks.scheduler:initialize_model_parallel",
            "the DCP groups would not exist",
        ),
        Hook(
            "groups-destroy",
            f"{_SRT}.distributed.parallel_state.destroy_model_parallel",
            Kind.BEFORE,
            "sglang_dcp.hooks.scheduler:destroy_model_parallel",
            "the DCP groups would outlive the world that they are part of",
        ),
        Hook(
            "groups-capture",
            f"{_SRT}.distributed.parallel_state.graph_capture",
            Kind.AROUND,
            "sglang_dcp.distributed.groups:graph_capture_with_dcp",
            "collectives inside a CUDA graph need the DCP group in capture mode",
        ),
        Hook(
            "all-to-all-group",
            f"{_SRT}.distributed.parallel_state.GroupCoordinator.all_to_all_single",
            Kind.AROUND,
            "sglang_dcp.hooks.scheduler:group_all_to_all_single",
            "code of other projects would lack PyNccl in graphs, and could not run on CPU",
            until="0.5.17",
        ),
        Hook(
            "all-to-all-pynccl",
            f"{_SRT}.distributed.device_communicators.pynccl"
            ".PyNcclCommunicator.all_to_all_single",
            Kind.ATTRIBUTE,
            "sglang_dcp.distributed.all_to_all:pynccl_all_to_all_single",
            "code of other projects would miss the method, which 0.5.16 lacks",
            until="0.5.17",
        ),
        Hook(
            "attention-default",
            f"{_SRT}.arg_groups.model_override_base.get_default_attn_backend",
            Kind.AROUND,
            "sglang_dcp.hooks.server_args:default_attn_backend",
            "SGLang would choose a backend that cannot serve the model with DCP",
            since="0.5.23",
        ),
        Hook(
            "kv-pool-post-capture",
            f"{_SRT}.arg_groups.overrides.post_capture_kv_sizing_planned",
            Kind.AROUND,
            "sglang_dcp.hooks.server_args:post_capture_kv_sizing_planned",
            "the resize after graph capture would take one rank's tokens for logical ones",
            since="0.5.23",
        ),
        Hook(
            "kv-heads-config",
            f"{_SRT}.configs.model_config.ModelConfig.from_server_args",
            Kind.AROUND,
            "sglang_dcp.hooks.model_config:model_config_from_server_args",
            "model, pool and backend would divide the K/V-head count by tp_size",
        ),
        Hook(
            "kv-heads-model",
            f"{_SRT}.model_loader.loader._initialize_model",
            Kind.AFTER,
            "sglang_dcp.hooks.model_config:initialize_model",
            "a model that cuts K/V heads by itself would load wrong heads",
        ),
        Hook(
            "kv-heads-weights",
            f"{_SRT}.layers.linear.QKVParallelLinear.__init__",
            Kind.AROUND,
            "sglang_dcp.layers.heads:qkv_parallel_linear_init",
            "ranks of one DCP group would load different K/V heads",
        ),
        Hook(
            "kv-pool-budget",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator"
            ".config_from_budget",
            Kind.AFTER,
            "sglang_dcp.layers.kv_pool:config_from_budget",
            "the scheduler would count one rank's tokens, not those of the DCP group",
        ),
        Hook(
            "kv-pool-input-bound",
            f"{_SRT}.managers.tp_worker.TpModelWorker.get_worker_info",
            Kind.AFTER,
            "sglang_dcp.layers.kv_pool:bound_input",
            "a prompt that fills the pool would wait for ever and block all others",
        ),
        Hook(
            "kv-pool-input-message",
            f"{_SRT}.managers.scheduler.validate_input_length",
            Kind.AFTER,
            "sglang_dcp.layers.kv_pool:explain_input_bound",
            "the error for a prompt as long as the bound would say that it exceeds it",
        ),
        Hook(
            "chunk-admission",
            f"{_SRT}.managers.schedule_policy.PrefillAdder.add_chunked_req",
            Kind.AROUND,
            "sglang_dcp.hooks.admission:add_chunked_req",
            "a chunk of a prompt in a pool full of decoded requests would end the server",
        ),
        Hook(
            "kv-pool-mha",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:build_kv_pool",
            "a rank's pool would have room for the positions of all ranks",
        ),
        Hook(
            "kv-pool-mla",
            f"{_SRT}.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mla_kv_pool",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:build_kv_pool",
            "a rank's pool would have room for the positions of all ranks",
        ),
        Hook(
            "fused-kv-write",
            f"{_SRT}.models.utils.enable_fused_set_kv_buffer",
            Kind.AROUND,
            "sglang_dcp.layers.kv_pool:enable_fused_set_kv_buffer",
            "the fused RoPE kernel would write to logical slots of a rank's pool",
        ),
        Hook(
            "mla-torch-native",
            f"{_SRT}.models.deepseek_common.attention_backend_handler"
            ".AttentionBackendRegistry._handlers[torch_native]",
            Kind.ENTRY,
            "sglang_dcp.layers.mla.dispatch:mla_forward_method_torch_native",
            "prefill would expand latents to heads and write them to logical slots",
        ),
        *(
            Hook(
                f"mla-{name}",
                f"{_SRT}.models.deepseek_common.attention_backend_handler"
                f".AttentionBackendRegistry._handlers[{name}]",
                Kind.ENTRY,
                f"sglang_dcp.layers.mla.dispatch:mla_forward_method_{name}",
                "every long prefix would be gathered, even if an exchange moves less",
            )
            for name in ("fa3", "flashinfer")
        ),
        *(
            Hook(
                f"mla-latents-{verb}",
                f"{_SRT}.models.deepseek_common.attention_forward_methods.forward_mha"
                f".DeepseekMHAForwardMixin._{verb}_mla_kv_buffer",
                Kind.AROUND,
                f"sglang_dcp.layers.mla.dispatch:{verb}_mla_kv_buffer",
                f"an expanded prefill would {what} logical slots of a rank's pool",
            )
            for verb, what in (("set", "write"), ("get", "read"))
        ),
        Hook(
            "mla-eager-region",
            f"{_SRT}.models.deepseek_v2.DeepseekV2AttentionMLA.forward",
            Kind.AROUND,
            "sglang_dcp.layers.mla.eager_region:attention_forward",
            "a prefill graph would replay the form of its capture, whatever the prefix",
            since="0.5.23",
        ),
        Hook(
            "metrics-start",
            f"{_SRT}.managers.scheduler.Scheduler.init_metrics_reporter",
            Kind.AFTER,
            "sglang_dcp.hooks.metrics:init_metrics_reporter",
            "estimated bytes would count each cached token dcp_size times, and /metrics "
            "would not tell the layout, nor when the exchange falls back",
        ),
        Hook(
            "metrics-decode-estimate",
            f"{_SRT}.managers.scheduler_components.metrics_reporter"
            ".SchedulerMetricsReporter._estimate_decode_perf",
            Kind.AFTER,
            "sglang_dcp.hooks.metrics:estimate_decode_perf",
            "the estimates would leave out the replicated part of the Q projection",
        ),
        Hook(
            "server-info",
            f"{_SRT}.managers.scheduler.Scheduler.get_internal_state",
            Kind.AFTER,
            "sglang_dcp.hooks.metrics:get_internal_state",
            "/server_info would say that a scheduler has dcp_size 1, and not which "
            "exchange is in use",
        ),
        Hook(
            "q-replication",
            f"{_SRT}.model_executor.model_runner.ModelRunner.load_model",
            Kind.AFTER,
            "sglang_dcp.layers.q_replication:after_load_model",
            "a replicated Q projection would return the heads of all ranks in prefill too",
        ),
    )
    + (
        Hook(
            "short-prefill",
            f"{_SRT}.model_executor.model_runner.ModelRunner._forward_raw",
            Kind.AROUND,
            "sglang_dcp.layers.short_prefill:forward_raw",
            "a few new tokens would take as long as the launches of a whole prefill",
            since="0.5.23",
        ),
        Hook(
            "chain-steps",
            f"{_SRT}.model_executor.runner.decode_cuda_graph_runner."
            "DecodeCudaGraphRunner.capture_one_shape",
            Kind.AROUND,
            "sglang_dcp.layers.chain_steps:capture_size",
            "each new token of a short prefill would read the whole prefix",
            since="0.5.23",
        ),
    )
    + tuple(
        Hook(
            f"speculation-{name}",
            f"{_SRT}.speculative.{target}",
            Kind.AROUND,
            f"sglang_dcp.hooks.speculation:{ours}",
            why,
            since="0.5.23",
        )
        for name, target, ours, why in (
            (
                "draft-steps",
                "draft_utils.DraftBackendFactory.create_decode_backend",
                "create_draft_decode_backend",
                "the draft model would read logical slots from a rank's pool",
            ),
            (
                "draft-extend",
                "draft_utils.DraftBackendFactory.create_draft_extend_backend",
                "create_draft_extend_backend",
                "the draft model would fill its pool by logical slots",
            ),
            (
                "draft-graphs",
                "eagle_worker_v2._select_spec_graph_runner_cls",
                "select_graph_runner",
                "the extension of a draft would have no CUDA graph",
            ),
            (
                "worker",
                "spec_info.SpeculativeAlgorithm.create_worker",
                "create_worker",
                "NGRAM would propose trees, and each row sees all rows before it",
            ),
            (
                "accepted-kv",
                "spec_utils.move_accept_tokens_to_target_kvcache",
                "move_accept_tokens",
                "K/V of accepted tokens would be moved by logical slots",
            ),
        )
    )
    + tuple(
        Hook(
            f"attention-{name.replace('_', '-')}",
            f"{_SRT}.layers.attention.attention_registry.ATTENTION_BACKENDS[{name}]",
            Kind.ENTRY,
            f"sglang_dcp.hooks.attention:{creator}",
            "SGLang's backend would read logical slots from a rank's pool",
        )
        for name, creator in (
            ("torch_native", "create_torch_native_backend"),
            ("triton", "create_triton_backend"),
            ("flashinfer", "create_flashinfer_backend"),
            ("fa3", "create_flashattention_v3_backend"),
        )
    )
    + tuple(
        Hook(
            f"q-replication-{source}",
            f"{_UPDATER}.update_weights_from_{source}",
            Kind.AROUND,
            "sglang_dcp.layers.q_replication:around_weight_update",
            "a weight update would not reach the K weights that other ranks gathered",
            until=until,
        )
        for source, until in (
            ("disk", None),
            ("distributed", "0.5.23"),
            ("tensor", "0.5.23"),
            ("ipc", None),
        )
    )
    + (
        Hook(
            "q-replication-end",
            f"{_UPDATER}.end_weight_update",
            Kind.AROUND,
            "sglang_dcp.layers.q_replication:around_weight_update",
            "tensors and broadcasts of an update would not reach gathered K weights",
            since="0.5.23",
        ),
    )
)

CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "cpu-rope",
        f"{_SRT}.layers.rotary_embedding.base._is_cpu",
        Kind.ATTRIBUTE,
        "sglang_dcp.hooks.cpu:IS_CPU",
        "without a GPU, RotaryEmbedding would import vLLM",
    ),
    Hook(
        "cpu-rope-plain",
        f"{_SRT}.layers.rotary_embedding.factory.get_rope_wrapper",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:get_rope_wrapper",
        "on CPU, DeepSeek would accept only yarn-scaled rotary embeddings",
    ),
    Hook(
        "cpu-head-padding",
        f"{_SRT}.configs.update_config.adjust_config_with_unaligned_cpu_tp",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:adjust_config_with_unaligned_cpu_tp",
        "SGLang would pad heads for the AMX engine's loader, which is not in use",
    ),
    Hook(
        "cpu-pynccl",
        f"{_SRT}.distributed.device_communicators.pynccl.PyNcclCommunicator.__init__",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:pynccl_init",
        "NCCL, which a CUDA build of torch ships, would ask for a CUDA device",
    ),
    Hook(
        "cpu-thread-binding",
        f"{_SRT}.utils.numa_utils.init_threads_binding",
        Kind.BEFORE,
        "sglang_dcp.hooks.cpu:init_threads_binding",
        "SGLang would stop where there are more ranks than NUMA nodes",
    ),
    Hook(
        "cpu-grammar-mask",
        f"{_SRT}.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:apply_vocab_mask",
        "the first request with a JSON schema, a regex or a grammar would end the server",
        until="0.5.23",
    ),
    Hook(
        "cpu-grammar-mask-backend",
        f"{_SRT}.constrained.xgrammar_backend.XGrammarGrammarBackend.apply_vocab_mask",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:backend_vocab_mask",
        "strict thinking masks tokens without a grammar, and would end the server",
    ),
    *(
        Hook(
            f"cpu-lora-{name}",
            f"{_SRT}.lora.lora_manager.LoRAManager.{method}",
            Kind.AROUND,
            "sglang_dcp.hooks.cpu:without_pinned_memory",
            f"LoRA would ask for pinned memory {when}, which only a GPU gives",
        )
        for name, method, when in (
            ("start", "init_state", "at start"),
            ("batch", "prepare_lora_batch", "before each forward"),
        )
    ),
    Hook(
        "cpu-dp-sync",
        f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:without_pinned_memory",
        "DP attention would ask for pinned memory, which only a GPU gives",
    ),
    *(
        Hook(
            f"cpu-dp-{name}",
            f"{_SRT}.distributed.parallel_state.GroupCoordinator.{method}",
            Kind.AROUND,
            f"sglang_dcp.hooks.cpu:{method}",
            "DP attention would call a custom op, which has no CPU kernel",
        )
        for name, method in (
            ("gather", "all_gather_into_tensor"),
            ("scatter", "reduce_scatter_tensor"),
        )
    ),
    Hook(
        "cpu-dp-padding",
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend"
        ".get_cuda_graph_seq_len_fill_value",
        Kind.AROUND,
        "sglang_dcp.hooks.cpu:padding_length",
        "DP attention pads eager batches too, for which torch_native names no length",
    ),
    Hook(
        "cpu-dp-copy-kernel",
        f"{_SRT}.layers.dp_attention.memcpy_triton",
        Kind.ATTRIBUTE,
        "sglang_dcp.hooks.cpu:copy_rows",
        "DP attention has only a Triton kernel to copy the tokens of a replica",
        until="0.5.23",
    ),
    Hook(
        "cpu-dp-copy",
        f"{_SRT}.layers.dp_attention.memcpy_func",
        Kind.ATTRIBUTE,
        "sglang_dcp.hooks.cpu:copy_rows",
        "DP attention would copy the tokens of a replica by a Triton kernel",
        since="0.5.23",
    ),
    Hook(
        "cpu-alloc-extend",
        f"{_SRT}.mem_cache.allocator.paged.alloc_extend_kernel",
        Kind.ATTRIBUTE,
        "sglang_dcp.hooks.cpu:ALLOC_EXTEND",
        "the paged allocator has only Triton kernels",
        until="0.5.23",
    ),
    Hook(
        "cpu-alloc-decode",
        f"{_SRT}.mem_cache.allocator.paged.alloc_decode_kernel",
        Kind.ATTRIBUTE,
        "sglang_dcp.hooks.cpu:ALLOC_DECODE",
        "the paged allocator has only Triton kernels",
        until="0.5.23",
    ),
)


@dataclass(frozen=True)
class ReliedFile:
    """A file of SGLang that no hook touches, and that our code repeats or calls into.

    `path` is below the `sglang` package. `since` and `until` are those of `Hook`.
    """

    path: str
    since: Optional[str] = None
    until: Optional[str] = None


# Our backends, local batch and models repeat what is in these files, so `verify` checks
# their hashes too.
RELIES_ON: tuple[ReliedFile, ...] = (
    ReliedFile("kernels/ops/attention/decode_attention.py"),
    ReliedFile("kernels/ops/attention/extend_attention.py"),
    ReliedFile("kernels/ops/attention/kv_indices.py", since="0.5.23"),
    ReliedFile("kernels/ops/kvcache/kv_indices.py", until="0.5.23"),
    ReliedFile("kernels/ops/kvcache/mla_buffer.py"),
    ReliedFile("srt/layers/attention/base_attn_backend.py"),
    ReliedFile("srt/layers/attention/flashattention_backend.py"),
    ReliedFile("srt/layers/attention/flashinfer_backend.py"),
    ReliedFile("srt/layers/attention/triton_backend.py"),
    ReliedFile("srt/layers/dcp/comm.py"),
    ReliedFile("srt/layers/parameter.py"),
    ReliedFile("srt/layers/quantization/fp8.py"),
    ReliedFile("srt/layers/quantization/unquant.py"),
    ReliedFile("srt/layers/radix_attention.py"),
    ReliedFile("srt/mem_cache/memory_pool.py"),
    ReliedFile("srt/model_executor/forward_batch_deepseek_mha_mixin.py"),
    ReliedFile("srt/model_executor/forward_batch_info.py"),
    ReliedFile("srt/model_executor/runner/decode_cuda_graph_runner.py"),
    ReliedFile("srt/model_executor/runner/eager_runner.py"),
    ReliedFile("srt/models/apertus.py"),
    ReliedFile("srt/models/arcee.py"),
    ReliedFile("srt/models/bailing_moe.py", since="0.5.23"),
    ReliedFile("srt/models/commandr.py"),
    ReliedFile("srt/models/deepseek.py", since="0.5.23"),
    ReliedFile("srt/models/deepseek_common/attention_forward_methods/forward_mla.py"),
    ReliedFile("srt/models/deepseek_common/deepseek_weight_loader.py"),
    ReliedFile("srt/models/deepseek_common/utils.py"),
    ReliedFile("srt/models/deepseek_v2.py"),
    ReliedFile("srt/models/ernie4.py"),
    ReliedFile("srt/models/exaone.py", since="0.5.23"),
    ReliedFile("srt/models/gemma.py"),
    ReliedFile("srt/models/glm4.py"),
    ReliedFile("srt/models/glm4_moe.py"),
    ReliedFile("srt/models/glm4_moe_lite.py"),
    ReliedFile("srt/models/granite.py"),
    ReliedFile("srt/models/granitemoe.py"),
    ReliedFile("srt/models/hunyuan_v3.py", since="0.5.23"),
    ReliedFile("srt/models/internlm2.py", since="0.5.23"),
    ReliedFile("srt/models/llama.py"),
    ReliedFile("srt/models/mimo.py"),
    ReliedFile("srt/models/minicpm.py", since="0.5.23"),
    ReliedFile("srt/models/minimax_m2.py"),
    ReliedFile("srt/models/ministral3.py"),
    ReliedFile("srt/models/mistral.py"),
    ReliedFile("srt/models/mixtral.py"),
    ReliedFile("srt/models/nanbeige.py", since="0.5.23"),
    ReliedFile("srt/models/olmo2.py"),
    ReliedFile("srt/models/orion.py", since="0.5.23"),
    ReliedFile("srt/models/phimoe.py"),
    ReliedFile("srt/models/qwen2.py"),
    ReliedFile("srt/models/qwen2_moe.py"),
    ReliedFile("srt/models/qwen3.py"),
    ReliedFile("srt/models/qwen3_moe.py"),
    ReliedFile("srt/models/solar.py", since="0.5.23"),
    ReliedFile("srt/models/stablelm.py"),
    ReliedFile("srt/models/teleflm.py", since="0.5.23"),
    ReliedFile("srt/models/xverse.py"),
    ReliedFile("srt/models/xverse_moe.py", since="0.5.23"),
    ReliedFile("srt/arg_groups/arg_utils.py", since="0.5.23"),
    ReliedFile("srt/arg_groups/pipeline.py", since="0.5.23"),
    ReliedFile("srt/layers/attention/graph_utils.py", since="0.5.23"),
    ReliedFile("srt/mem_cache/kv_index_translator.py", since="0.5.23"),
    ReliedFile(
        "srt/model_executor/runner/prefill_cuda_graph_runner.py", since="0.5.23"
    ),
    ReliedFile(
        "srt/model_executor/runner_backend/breakable_cuda_graph_backend.py",
        since="0.5.23",
    ),
    ReliedFile(
        "srt/model_executor/runner_backend_utils/breakable_cuda_graph/"
        "breakable_cuda_graph.py",
        since="0.5.23",
    ),
    ReliedFile("srt/runtime_context.py", since="0.5.23"),
    ReliedFile("srt/speculative/eagle_draft_cuda_graph_runner.py", since="0.5.23"),
    ReliedFile("srt/speculative/eagle_info.py", since="0.5.23"),
    ReliedFile("srt/speculative/eagle_worker_common.py", since="0.5.23"),
    ReliedFile("srt/speculative/eagle_worker_v2.py", since="0.5.23"),
    ReliedFile("srt/speculative/ngram_info.py", since="0.5.23"),
    ReliedFile("srt/speculative/ngram_worker.py", since="0.5.23"),
    ReliedFile("srt/speculative/standalone_worker_v2.py", since="0.5.23"),
)


class _Ranged(Protocol):
    @property
    def since(self) -> Optional[str]: ...

    @property
    def until(self) -> Optional[str]: ...


_Row = TypeVar("_Row", bound=_Ranged)


def rows_of(rows: tuple[_Row, ...], version: Optional[str] = None) -> tuple[_Row, ...]:
    """Return the rows that hold for a release of SGLang: the installed one by default."""
    release = version or sglang_version()
    return tuple(row for row in rows if in_range(release, row.since, row.until))


def active_hooks() -> tuple[Hook, ...]:
    """Return the hooks of this machine. Those for CPU join if torch sees no accelerator."""
    import torch

    on_gpu = torch.accelerator.is_available()
    return rows_of(HOOKS if on_gpu else HOOKS + CPU_HOOKS)


def relied_files() -> tuple[str, ...]:
    """Return the files of the installed release that our code relies on."""
    return tuple(row.path for row in rows_of(RELIES_ON))
