"""Server arguments that do not work with DCP yet.

The checks run before and after SGLang resolves a `ServerArgs`. They read its attributes
and no state of the process, so a test can pass any object with these attributes.
"""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.distributed.exchange import Exchange, exchange_class
from sglang_dcp.layers.backends.capabilities import Requirement
from sglang_dcp.support.backends import check_backend
from sglang_dcp.support.experts import check_experts
from sglang_dcp.support.lora import UNSUPPORTED_LORA, check_adapters_of_latents
from sglang_dcp.support.quantization import (
    DROP_REPLICATION,
    UNPROVEN,
    torchao_beside_replicated_q,
)
from sglang_dcp.support.rules import (
    DROP,
    Unsupported,
    Value,
    above,
    below,
    check_rules,
    flag_of,
    given,
    other_graph,
    raise_unsupported,
    switched_on,
)
from sglang_dcp.support.speculation import UNSUPPORTED_SPECULATION

# The `capabilities` of an attention backend say which of these it reads.
_KV_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e4m3")

# These formats copy whole parameters of a rank, and fill a larger one without an error.
# The key of a presharded cache may lack the shapes.
# The loader of bitsandbytes cuts K/V rows itself, by tensor-parallel rank.
_LOADS_OF_SHARDS = (
    *("sharded_state", "presharded", "remote", "remote_instance"),
    "bitsandbytes",
)


def _shards(args: Any) -> Optional[str]:
    # SGLang turns the string into an enumeration of strings.
    name = getattr(args.load_format, "value", args.load_format)
    return name if name in _LOADS_OF_SHARDS else None


def _scales_by_rank(args: Any) -> Optional[str]:
    name = getattr(args.load_format, "value", args.load_format)
    return "flash_rl" if name == "flash_rl" else None


def _device(args: Any) -> Optional[str]:
    """Return an unsupported device, or None. The device may not be chosen yet."""
    import torch

    if args.device == "cuda":
        return "cuda (ROCm)" if torch.version.hip else None
    return None if args.device in (None, "cpu") else args.device


def _disaggregation(args: Any) -> Optional[str]:
    return None if args.disaggregation_mode == "null" else args.disaggregation_mode


def _foreign_models(args: Any) -> Optional[str]:
    from sglang.srt.environ import envs

    package: str = envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get()
    return package or None


def _hooks_on_q(args: Any) -> Optional[str]:
    """Hooks of a user see what a layer returns, and its width changes in decode."""
    hooks = args.forward_hooks
    return (
        "with --dcp-replicate-q-proj" if hooks and args.dcp.replicate_q_proj else None
    )


def _late_weights(args: Any) -> Optional[str]:
    """Without replicated Q weights, nothing of ours reads weights before they arrive."""
    late = args.startup_weight_load_mode == "overlap"
    return "overlap" if late and args.dcp.replicate_q_proj else None


def _nodes_without_address(args: Any) -> Optional[str]:
    from sglang.srt.environ import envs

    if (args.nnodes or 1) == 1 or args.dist_init_addr:
        return None
    if envs.SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE.get():
        return None
    return f"{args.nnodes} without --dist-init-addr"


def _no_such_node(args: Any) -> Optional[str]:
    """SGLang would start ranks that the world does not have, or those of another node."""
    nodes, rank = args.nnodes or 1, args.node_rank or 0
    return None if 0 <= rank < nodes else f"{rank} of --nnodes {nodes}"


def _beside_replicated_q(name: str) -> Value:
    """Apply to any truthy value of argument `name`, with replicated Q weights."""

    def value(args: Any) -> Optional[Any]:
        found = given(name)(args)
        return found if found and args.dcp.replicate_q_proj else None

    return value


def _flag(
    name: str,
    reason: str,
    hint: str = DROP,
    *,
    fine: tuple[str, ...] = (),
    since: Optional[str] = None,
    until: Optional[str] = None,
) -> Unsupported:
    """Make the rule for argument `name`, for any truthy value that is not in `fine`."""
    return Unsupported(
        flag_of(name), given(name, *fine), reason, hint, since=since, until=until
    )


def _at_least_one(name: str) -> Unsupported:
    flag = flag_of(name)
    return Unsupported(
        flag, below(name, 1), "it must be at least 1", f"use {flag} 1 or more"
    )


_SECOND_CUT = "prefill context parallelism cuts the sequence a second time"

UNSUPPORTED_SERVER_ARGS: tuple[Unsupported, ...] = (
    _at_least_one("page_size"),
    _at_least_one("context_length"),
    _at_least_one("max_total_tokens"),
    Unsupported(
        "--device",
        _device,
        "kernels and exchanges were made for NVIDIA GPUs and CPUs",
        "run without --dcp-size / --attn-tp-size",
    ),
    Unsupported(
        "--load-format",
        _shards,
        "its weights may be cut for tensor parallelism without DCP",
        "use --load-format auto and the whole checkpoint",
    ),
    Unsupported(
        "--load-format",
        _scales_by_rank,
        "a weight update cuts scales of K/V rows by tensor-parallel rank",
        "use --load-format auto",
        until="0.5.23",
    ),
    _flag(
        "weight_cache_mode",
        "its daemon cuts K/V heads for tensor parallelism without DCP",
        "use --weight-cache-mode off",
        fine=("off",),
        since="0.5.23",
    ),
    _flag(
        "remote_instance_weight_loader_start_seed_via_transfer_engine",
        "it publishes weights that are cut in another way than plain TP cuts them",
    ),
    Unsupported(
        "--startup-weight-load-mode",
        _late_weights,
        "--dcp-replicate-q-proj gathers weights before they arrive",
        "use --startup-weight-load-mode serial, or drop --dcp-replicate-q-proj",
        since="0.5.23",
    ),
    _flag(
        "quantization_param_path",
        "its scales reach the write of K/V, but not every read",
    ),
    _flag(
        "enable_symm_mem",
        "its eager collectives would run on the communicators of captured graphs, "
        "which DCP forbids NCCL to serve (NCCL_GRAPH_MIXING_SUPPORT=0)",
    ),
    _flag(
        "debug_cuda_graph",
        "its replay runs decode steps eagerly outside of graph capture, where exchanges "
        "leave PyNccl",
        "use --disable-cuda-graph, which runs decode eagerly too",
    ),
    Unsupported(
        "--cuda-graph-backend-decode",
        other_graph("decode", "full", "breakable"),
        "torch.compile would freeze the local batch, which changes between forwards",
        "use --cuda-graph-backend-decode full, also in --cuda-graph-config",
    ),
    Unsupported(
        "SGLANG_ENABLE_METADATA_GLUE_GRAPH",
        switched_on("SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        "it would replay the local batch of an earlier decode step",
        "unset the variable",
        since="0.5.23",
    ),
    _flag(
        "enable_nvidia_megakernel",
        "its kernels run whole decode steps and know of no sharded sequence",
        since="0.5.23",
    ),
    *UNSUPPORTED_SPECULATION,
    Unsupported(
        "--disaggregation-mode",
        _disaggregation,
        "KV transfer does not know which rank owns a token",
        "use --disaggregation-mode null",
    ),
    _flag(
        "enable_kv_cache_sharding",
        "it shards the KV cache by pages, and DCP by positions",
        since="0.5.23",
    ),
    _flag("enable_hierarchical_cache", "host copies are indexed by logical slots"),
    _flag(
        "enable_unified_cache_external_linker",
        "copies in the external store are indexed by logical slots",
        since="0.5.23",
    ),
    _flag("enable_lmcache", "LMCache is indexed by logical slots"),
    _flag("enable_flexkv", "FlexKV is indexed by logical slots"),
    _flag("radix_cache_backend", "a foreign cache may copy K/V by logical slots"),
    _flag(
        "enable_torch_compile",
        "the local batch changes between forwards, and a traced graph would freeze it",
    ),
    _flag(
        "enable_deterministic_inference",
        "merging a cached prefix changes the order of summation",
    ),
    _flag(
        "model_impl",
        "its projections do not take their heads from SGLang's layers",
        "use --model-impl auto",
        fine=("auto", "sglang"),
    ),
    Unsupported(
        "--torchao-config",
        torchao_beside_replicated_q,
        UNPROVEN,
        DROP_REPLICATION,
        until="0.5.23",
    ),
    Unsupported(
        "--cpu-offload-gb",
        _beside_replicated_q("cpu_offload_gb"),
        "--dcp-replicate-q-proj gathers weights between GPUs, and they may lie in host "
        "memory",
        "drop --dcp-replicate-q-proj",
    ),
    Unsupported(
        "--enable-layernorm-sp",
        _beside_replicated_q("enable_layernorm_sp"),
        "a Q projection of attn_tp width does not gather the tokens of all ranks",
        "drop --dcp-replicate-q-proj",
        since="0.5.23",
    ),
    _flag(
        "enable_mis",
        "items would attend to each other: no attention backend masks them",
    ),
    _flag("enable_unified_memory", "the unified pool is not sharded by position"),
    _flag("enable_hisparse", "its pools are not sharded"),
    _flag("enable_page_major_kv_layout", "its page stride assumes logical pages"),
    _flag("prefill_only_disable_kv_cache", "there is no KV cache to shard"),
    _flag(
        "kv_cache_dtype",
        "no attention backend of this version reads it",
        "use --kv-cache-dtype auto or fp8_e4m3",
        fine=_KV_DTYPES,
    ),
    Unsupported(
        "--attention-context-parallel-size",
        above("attn_cp_size", 1),
        _SECOND_CUT,
        "use --attention-context-parallel-size 1",
    ),
    _flag("enable_prefill_cp", _SECOND_CUT),
    Unsupported(
        "--dwdp-size",
        above("dwdp_size", 1),
        "it runs the attention of each request on one rank",
        "use --dwdp-size 1, and --dp-size with DP attention",
        since="0.5.23",
    ),
    Unsupported(
        "--pp-size",
        above("pp_size", 1),
        "pipeline stages were not tested",
        "use --pp-size 1",
    ),
    Unsupported(
        "--nnodes",
        _nodes_without_address,
        "each node would wait for the others at an address of its own",
        "give all nodes the same --dist-init-addr, HOST:PORT of node 0",
    ),
    Unsupported(
        "--node-rank",
        _no_such_node,
        "nodes are numbered from 0 to nnodes - 1",
        "give each node a --node-rank of its own below --nnodes",
    ),
    *UNSUPPORTED_LORA,
    _flag("enable_two_batch_overlap", "two batches would share one local table"),
    _flag(
        "enable_pdmux",
        "prefill and decode would use one DCP group from two streams at once",
    ),
    _flag("dllm_algorithm", "its attention is not causal"),
    _flag(
        "kv_canary", "it checks logical slots against one rank's pool", fine=("none",)
    ),
    _flag("elastic_ep_backend", "groups would change after start"),
    _flag(
        "use_ray",
        "Ray actors rebuild the server arguments",
        "start without Ray",
    ),
    Unsupported(
        "--forward-hooks",
        _hooks_on_q,
        "in decode a Q projection returns the heads of its whole DCP group",
        "drop --dcp-replicate-q-proj",
    ),
    Unsupported(
        "SGLANG_EXTERNAL_MODEL_PACKAGE",
        _foreign_models,
        "its classes take the place of models by the names that DCP knows",
        "unset the variable",
    ),
    Unsupported(
        "SGLANG_USE_HND_KVCACHE",
        switched_on("SGLANG_USE_HND_KVCACHE"),
        "slots are written in NHD order",
        "unset the variable",
    ),
)


def default_comm_backend(device: Optional[str]) -> str:
    """Return the exchange if the user names none. The device may not be chosen yet.

    It is SGLang's default: one all-to-all on GPUs. gloo has both forms on CPUs.
    """
    import torch

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    return "ag_rs" if on_cpu else "a2a"


def check_comm_backend(name: str) -> type[Exchange]:
    """Return the exchange of `--dcp-comm-backend`; `DcpConfigError` if it is unknown."""
    if name == "fi_a2a":
        raise_unsupported(
            "--dcp-comm-backend",
            name,
            "FlashInfer's kernel needs memory that only MNNVL systems (Blackwell) map",
            "use --dcp-comm-backend a2a, or symm_a2a on GPUs of one node",
        )
    try:
        return exchange_class(name)
    except ValueError as error:
        raise DcpConfigError(str(error)) from None


def _check_exchange(config: DcpConfig, device: Optional[str]) -> None:
    """Raise if the exchange does not serve this number of ranks, or this device."""
    name = config.comm_backend
    exchange = check_comm_backend(name)
    if exchange.max_ranks is not None and config.dcp_size > exchange.max_ranks:
        raise DcpConfigError(
            f"--dcp-comm-backend {name} serves up to {exchange.max_ranks} DCP ranks, not "
            f"{config.dcp_size}; use a2a or ag_rs, or a larger --attn-tp-size"
        )
    if device == "cpu" and exchange.needs_gpu:
        raise_unsupported(
            "--dcp-comm-backend",
            name,
            exchange.needs_gpu,
            "use --dcp-comm-backend a2a or ag_rs",
        )


def check_server_args(args: Any, requirement: Optional[Requirement] = None) -> None:
    """Check server arguments, the exchange and the named attention backends.

    Parameters
    ----------
    args
        A `ServerArgs` with `dcp` set.
    requirement : Requirement, optional
        What the server requires of its attention backend, as far as it is known. None
        checks the device alone.

    Raises
    ------
    DcpConfigError
        The message has the first unsupported flag, its value, the reason and a hint.
    """
    check_rules(UNSUPPORTED_SERVER_ARGS, args)
    check_experts(args)
    _check_exchange(args.dcp, args.device)
    if requirement is not None and requirement.mla:
        check_adapters_of_latents(args)
    used = {}
    for kind in ("attention", "prefill_attention", "decode_attention"):
        name = getattr(args, f"{kind}_backend")
        if name is None:
            continue
        used[name] = f"--{kind.replace('_', '-')}-backend"
        check_backend(name, requirement or Requirement(args.device), flag=used[name])
    if len(used) > 1:
        raise_unsupported(
            " and ".join(used.values()),
            " and ".join(used),
            "prefill and decode share one local batch",
            "name one backend with --attention-backend",
        )
