"""Server arguments that do not work with DCP yet.

The checks run before and after SGLang resolves a `ServerArgs`. They read its attributes
and no state of the process, so a test can pass any object with these attributes.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

from sglang_dcp.config import DcpConfig, DcpConfigError
from sglang_dcp.distributed.exchange import Exchange, exchange_class
from sglang_dcp.layers.backends.capabilities import Requirement
from sglang_dcp.support.backends import check_backend
from sglang_dcp.support.rules import Unsupported, check_rules, raise_unsupported


def _set(name: str) -> Callable[[Any], Optional[Any]]:
    """Make a rule's `value` that applies to any truthy value of a server argument."""
    return lambda args: getattr(args, name) or None


def _below(name: str, least: int) -> Callable[[Any], Optional[Any]]:
    def value(args: Any) -> Optional[Any]:
        given = getattr(args, name)
        return given if given is not None and given < least else None

    return value


def _above_one(name: str) -> Callable[[Any], Optional[Any]]:
    return lambda args: getattr(args, name) if getattr(args, name) > 1 else None


def _disaggregation(args: Any) -> Optional[str]:
    return None if args.disaggregation_mode == "null" else args.disaggregation_mode


def _offload_groups(args: Any) -> Optional[int]:
    return args.offload_group_size if args.offload_group_size > 0 else None


def _canary(args: Any) -> Optional[str]:
    return None if args.kv_canary in (None, "none") else args.kv_canary


# The `capabilities` of an attention backend say which of these it reads.
_KV_DTYPES = ("auto", "bfloat16", "bf16", "fp8_e4m3")


def _packed_kv(args: Any) -> Optional[str]:
    return None if args.kv_cache_dtype in _KV_DTYPES else args.kv_cache_dtype


# These formats copy whole parameters of a rank, without a check of their shape.
_LOADS_OF_SHARDS = ("sharded_state", "remote", "remote_instance")


def _shards(args: Any) -> Optional[str]:
    # SGLang turns the string into an enumeration of strings.
    name = getattr(args.load_format, "value", args.load_format)
    return name if name in _LOADS_OF_SHARDS else None


def _device(args: Any) -> Optional[str]:
    """Return an unsupported device, or None. The device may not be chosen yet."""
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


def _flag(name: str, reason: str, hint: str = _DROP) -> Unsupported:
    """Make the rule for server argument `name`, for any truthy value."""
    return Unsupported(f"--{name.replace('_', '-')}", _set(name), reason, hint)


def _at_least_one(name: str) -> Unsupported:
    flag = f"--{name.replace('_', '-')}"
    return Unsupported(
        flag, _below(name, 1), "it must be at least 1", f"use {flag} 1 or more"
    )


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
        "its shards were cut for tensor parallelism without DCP",
        "use --load-format auto and the whole checkpoint",
    ),
    _flag(
        "quantization_param_path",
        "its scales reach the write of K/V, but not every read",
    ),
    _flag("enable_symm_mem", "not tested"),
    _flag("debug_cuda_graph", "not tested"),
    Unsupported(
        "--cuda-graph-backend-decode",
        _decode_graph,
        "not tested",
        "use --cuda-graph-backend-decode full",
    ),
    _flag(
        "speculative_algorithm",
        "a draft token would be checked against one shard of the sequence",
    ),
    Unsupported(
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
        "the local batch changes between forwards, and a traced graph would freeze it",
    ),
    _flag(
        "enable_deterministic_inference",
        "merging a cached prefix changes the order of summation",
    ),
    Unsupported(
        "--model-impl",
        _other_model_impl,
        "its projections do not take their heads from SGLang's layers",
        "use --model-impl auto",
    ),
    Unsupported(
        "--moe-a2a-backend",
        _moe_a2a,
        "tokens would be scattered over ranks that must all see them",
        "use --moe-a2a-backend none, with any --ep-size",
    ),
    _flag("moe_dense_tp_size", "tokens would be padded over the attention width"),
    _flag(
        "enable_attn_tp_input_scattered", "attention would see a share of the tokens"
    ),
    _flag("enable_single_batch_overlap", "not tested"),
    _flag("torchao_config", "not tested"),
    _flag("cpu_offload_gb", "not tested"),
    Unsupported("--offload-group-size", _offload_groups, "not tested", _DROP),
    _flag(
        "enable_mis",
        "items would attend to each other: no attention backend masks them",
    ),
    _flag("enable_unified_memory", "the unified pool is not sharded by position"),
    _flag("enable_hisparse", "its pools are not sharded"),
    _flag("enable_page_major_kv_layout", "its page stride assumes logical pages"),
    _flag("prefill_only_disable_kv_cache", "there is no KV cache to shard"),
    Unsupported(
        "--kv-cache-dtype",
        _packed_kv,
        "no attention backend of this version reads it",
        "use --kv-cache-dtype auto or fp8_e4m3",
    ),
    Unsupported(
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
        "DCP groups are cut from the whole tensor-parallel group and would cross its "
        "data-parallel replicas",
        "use --dp-size replicas without --enable-dp-attention",
    ),
    Unsupported(
        "--pp-size",
        _above_one("pp_size"),
        "pipeline stages were not tested",
        "use --pp-size 1",
    ),
    Unsupported(
        "--nnodes",
        _above_one("nnodes"),
        "DCP groups over several nodes were not tested",
        "use one node",
    ),
    _flag("enable_lora", "adapters are cut by SGLang's own KV-head count"),
    _flag("enable_two_batch_overlap", "two batches would share one local table"),
    _flag("enable_pdmux", "not tested"),
    _flag("dllm_algorithm", "not causal"),
    Unsupported(
        "--kv-canary", _canary, "it checks logical slots against one rank's pool", _DROP
    ),
    _flag("elastic_ep_backend", "groups would change after start"),
    _flag(
        "use_ray",
        "Ray actors rebuild the server arguments",
        "start without Ray",
    ),
    Unsupported(
        "SGLANG_USE_HND_KVCACHE",
        _hnd_layout,
        "slots are written in NHD order",
        "unset the variable",
    ),
)


def check_comm_backend(name: str) -> type[Exchange]:
    """Return the exchange of `--dcp-comm-backend`; `DcpConfigError` if it is unknown."""
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
    _check_exchange(args.dcp, args.device)
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
