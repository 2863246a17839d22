"""Server arguments that do not work with DCP yet.

The checks read a `ServerArgs`, before and after SGLang resolves it, and know nothing of
processes, so that a test can hand them any object with the right attributes.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from sglang_dcp.backend_refusals import check_backend
from sglang_dcp.layers.adaptors.registry import Need
from sglang_dcp.refusals import Refusal, check_table, refuse


def _set(name: str) -> Callable[[Any], Optional[Any]]:
    """Refuse any truthy value of a server argument."""
    return lambda args: getattr(args, name) or None


def _above_one(name: str) -> Callable[[Any], Optional[Any]]:
    return lambda args: getattr(args, name) if getattr(args, name) > 1 else None


def _disaggregation(args: Any) -> Optional[str]:
    return None if args.disaggregation_mode == "null" else args.disaggregation_mode


def _symm_a2a_on_cpu(args: Any) -> Optional[str]:
    name = args.dcp_comm_backend
    return name if name == "symm_a2a" and args.device == "cpu" else None


def _offload_groups(args: Any) -> Optional[int]:
    return args.offload_group_size if args.offload_group_size > 0 else None


def _canary(args: Any) -> Optional[str]:
    return None if args.kv_canary in (None, "none") else args.kv_canary


# Which of these an attention backend reads is in its `Kernels`.
_KV_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e4m3")


def _packed_kv(args: Any) -> Optional[str]:
    return None if args.kv_cache_dtype in _KV_DTYPES else args.kv_cache_dtype


# They copy or send whole parameters of a rank, whatever shape is here.
_LOADS_OF_SHARDS = ("sharded_state", "remote", "remote_instance")


def _shards(args: Any) -> Optional[str]:
    # SGLang's is an enumeration of strings.
    name = getattr(args.load_format, "value", args.load_format)
    return name if name in _LOADS_OF_SHARDS else None


def _device(args: Any) -> Optional[str]:
    """None too where SGLang has not chosen it yet."""
    import torch

    if args.device == "cuda":
        return "cuda (ROCm)" if torch.version.hip else None
    return None if args.device in (None, "cpu") else args.device


def _decode_graph(args: Any) -> Optional[str]:
    name = args.cuda_graph_backend_decode
    return None if name in (None, "full", "disabled") else name


def _moe_a2a(args: Any) -> Optional[str]:
    return None if args.moe_a2a_backend == "none" else args.moe_a2a_backend


def _other_model_impl(args: Any) -> Optional[str]:
    return None if args.model_impl in ("auto", "sglang") else args.model_impl


def _hnd_layout(args: Any) -> Optional[str]:
    from sglang.srt.environ import envs

    return "1" if envs.SGLANG_USE_HND_KVCACHE.get() else None


_DROP = "drop the flag, or run without --dcp-size / --attn-tp-size"


def _flag(name: str, reason: str, way_out: str = _DROP) -> Refusal:
    """Refuse the flag of server argument `name`, whatever it is set to."""
    return Refusal(f"--{name.replace('_', '-')}", _set(name), reason, way_out)


SERVER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--device",
        _device,
        "kernels and exchanges were made for NVIDIA GPUs and CPUs",
        "run without --dcp-size / --attn-tp-size",
    ),
    Refusal(
        "--load-format",
        _shards,
        "its shards were cut by the K/V heads of plain tensor parallelism",
        "use --load-format auto and the whole checkpoint",
    ),
    _flag(
        "quantization_param_path",
        "its scales reach the write of K/V and not every read",
    ),
    _flag("enable_symm_mem", "not tested"),
    _flag("debug_cuda_graph", "not tested"),
    Refusal(
        "--cuda-graph-backend-decode",
        _decode_graph,
        "not tested",
        "use --cuda-graph-backend-decode full",
    ),
    Refusal(
        "--dcp-comm-backend",
        _symm_a2a_on_cpu,
        "its kernel stores to the memory of other NVIDIA GPUs",
        "use --dcp-comm-backend a2a or ag_rs",
    ),
    _flag(
        "speculative_algorithm",
        "a draft token would be checked against one shard of the sequence",
    ),
    Refusal(
        "--disaggregation-mode",
        _disaggregation,
        "KV transfer does not know which rank owns a token",
        "use --disaggregation-mode null",
    ),
    _flag("enable_hierarchical_cache", "host copies are indexed by logical slots"),
    _flag("enable_lmcache", "LMCache is indexed by logical slots"),
    _flag("enable_flexkv", "FlexKV is indexed by logical slots"),
    _flag("radix_cache_backend", "a foreign cache may copy K/V by logical slots"),
    _flag(
        "enable_torch_compile",
        "the local view changes between forwards in ways a traced graph would freeze",
    ),
    _flag(
        "enable_deterministic_inference",
        "merging a cached prefix changes the order of summation",
    ),
    Refusal(
        "--model-impl",
        _other_model_impl,
        "its projections do not take their heads from SGLang's layers",
        "use --model-impl auto",
    ),
    Refusal(
        "--moe-a2a-backend",
        _moe_a2a,
        "tokens would be scattered over ranks that must all see them",
        "use --moe-a2a-backend none, with --ep-size as you like",
    ),
    _flag("moe_dense_tp_size", "tokens would be padded over the attention width"),
    _flag(
        "enable_attn_tp_input_scattered", "attention would see a share of the tokens"
    ),
    _flag("enable_single_batch_overlap", "not tested"),
    _flag("torchao_config", "not tested"),
    _flag("cpu_offload_gb", "not tested"),
    Refusal("--offload-group-size", _offload_groups, "not tested", _DROP),
    _flag(
        "enable_mis",
        "items would attend to each other: no attention adaptor masks them",
    ),
    _flag("enable_unified_memory", "the unified pool is not sharded by position"),
    _flag("enable_hisparse", "its pools are not sharded"),
    _flag("enable_page_major_kv_layout", "its page stride assumes logical pages"),
    _flag("prefill_only_disable_kv_cache", "there is no KV cache to shard"),
    Refusal(
        "--kv-cache-dtype",
        _packed_kv,
        "no attention adaptor of this version reads it",
        "use --kv-cache-dtype auto or fp8_e4m3",
    ),
    Refusal(
        "--attention-context-parallel-size",
        _above_one("attn_cp_size"),
        "prefill context parallelism cuts the sequence a second time",
        "use --attention-context-parallel-size 1",
    ),
    _flag(
        "enable_prefill_cp",
        "prefill context parallelism cuts the sequence a second time",
    ),
    _flag(
        "enable_dp_attention",
        "KVP groups are cut from the whole tensor-parallel group and would cross its "
        "data-parallel replicas",
        "use --dp-size replicas without --enable-dp-attention",
    ),
    Refusal(
        "--pp-size",
        _above_one("pp_size"),
        "pipeline stages were not tested",
        "use --pp-size 1",
    ),
    Refusal(
        "--nnodes",
        _above_one("nnodes"),
        "KVP groups over several nodes were not tested",
        "use one node",
    ),
    _flag("enable_lora", "adapters are cut by SGLang's own KV-head count"),
    _flag("enable_two_batch_overlap", "two batches would share one local table"),
    _flag("enable_pdmux", "not tested"),
    _flag("dllm_algorithm", "not causal"),
    Refusal(
        "--kv-canary", _canary, "it checks logical slots against one rank's pool", _DROP
    ),
    _flag("elastic_ep_backend", "groups would change after start"),
    _flag(
        "use_ray",
        "Ray actors rebuild the server arguments",
        "start without Ray",
    ),
    Refusal(
        "SGLANG_USE_HND_KVCACHE",
        _hnd_layout,
        "slots are written in NHD order",
        "unset the variable",
    ),
)


def check_server_args(args: Any, need: Optional[Need] = None) -> None:
    """Refuse what `SERVER_REFUSALS` names and backends that cannot serve `need`.

    `need` is as far as the caller knows it; None: the device alone.

    Raises
    ------
    DcpConfigError
        With the first refused flag, its value, the reason and the way out.
    """
    check_table(SERVER_REFUSALS, args)
    used = {}
    for kind in ("attention", "prefill_attention", "decode_attention"):
        name = getattr(args, f"{kind}_backend")
        if name is None:
            continue
        used[name] = f"--{kind.replace('_', '-')}-backend"
        check_backend(name, need or Need(args.device), flag=used[name])
    if len(used) > 1:
        refuse(
            " and ".join(used.values()),
            " and ".join(used),
            "prefill and decode share one local view",
            "name one backend with --attention-backend",
        )
