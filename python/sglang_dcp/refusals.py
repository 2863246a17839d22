"""What does not work with DCP yet, each named with its value and the way out.

The checks read a resolved `ServerArgs` and know nothing of processes, so that a test
can hand them any object with the right attributes. Models: `model_refusals`.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

from sglang_dcp.config import DcpConfigError
from sglang_dcp.layers.adaptors.registry import Need, Unmet, adaptor_names, unmet


class Refusal(NamedTuple):
    """One combination that is refused.

    `value` returns what to print after the flag, or None where the combination is fine.
    """

    flag: str
    value: Callable[[Any], Optional[Any]]
    reason: str
    way_out: str


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


def _moe_a2a(args: Any) -> Optional[str]:
    return None if args.moe_a2a_backend == "none" else args.moe_a2a_backend


def _other_model_impl(args: Any) -> Optional[str]:
    return None if args.model_impl in ("auto", "sglang") else args.model_impl


def _hnd_layout(args: Any) -> Optional[str]:
    from sglang.srt.environ import envs

    return "1" if envs.SGLANG_USE_HND_KVCACHE.get() else None


_DROP = "drop the flag, or run without --dcp-size / --attn-tp-size"

SERVER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--dcp-comm-backend",
        _symm_a2a_on_cpu,
        "its kernel stores to the memory of other NVIDIA GPUs",
        "use --dcp-comm-backend a2a or ag_rs",
    ),
    Refusal(
        "--speculative-algorithm",
        _set("speculative_algorithm"),
        "a draft token would be checked against one shard of the sequence",
        _DROP,
    ),
    Refusal(
        "--disaggregation-mode",
        _disaggregation,
        "KV transfer does not know which rank owns a token",
        "use --disaggregation-mode null",
    ),
    Refusal(
        "--enable-hierarchical-cache",
        _set("enable_hierarchical_cache"),
        "host copies are indexed by logical slots",
        _DROP,
    ),
    Refusal(
        "--enable-lmcache",
        _set("enable_lmcache"),
        "LMCache is indexed by logical slots",
        _DROP,
    ),
    Refusal(
        "--enable-flexkv",
        _set("enable_flexkv"),
        "FlexKV is indexed by logical slots",
        _DROP,
    ),
    Refusal(
        "--radix-cache-backend",
        _set("radix_cache_backend"),
        "a foreign cache may copy K/V by logical slots",
        _DROP,
    ),
    Refusal(
        "--enable-torch-compile",
        _set("enable_torch_compile"),
        "the local view changes between forwards in ways a traced graph would freeze",
        _DROP,
    ),
    Refusal(
        "--enable-deterministic-inference",
        _set("enable_deterministic_inference"),
        "merging a cached prefix changes the order of summation",
        _DROP,
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
    Refusal(
        "--moe-dense-tp-size",
        _set("moe_dense_tp_size"),
        "tokens would be padded over the attention width",
        _DROP,
    ),
    Refusal(
        "--enable-attn-tp-input-scattered",
        _set("enable_attn_tp_input_scattered"),
        "attention would see a share of the tokens",
        _DROP,
    ),
    Refusal(
        "--enable-single-batch-overlap",
        _set("enable_single_batch_overlap"),
        "not tested",
        _DROP,
    ),
    Refusal("--torchao-config", _set("torchao_config"), "not tested", _DROP),
    Refusal("--cpu-offload-gb", _set("cpu_offload_gb"), "not tested", _DROP),
    Refusal("--offload-group-size", _offload_groups, "not tested", _DROP),
    Refusal(
        "--enable-mis",
        _set("enable_mis"),
        "items would attend to each other: no attention adaptor masks them",
        _DROP,
    ),
    Refusal(
        "--enable-unified-memory",
        _set("enable_unified_memory"),
        "the unified pool is not sharded by position",
        _DROP,
    ),
    Refusal(
        "--enable-hisparse", _set("enable_hisparse"), "its pools are not sharded", _DROP
    ),
    Refusal(
        "--enable-page-major-kv-layout",
        _set("enable_page_major_kv_layout"),
        "its page stride assumes logical pages",
        _DROP,
    ),
    Refusal(
        "--prefill-only-disable-kv-cache",
        _set("prefill_only_disable_kv_cache"),
        "there is no KV cache to shard",
        _DROP,
    ),
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
    Refusal(
        "--enable-prefill-cp",
        _set("enable_prefill_cp"),
        "prefill context parallelism cuts the sequence a second time",
        _DROP,
    ),
    Refusal(
        "--enable-dp-attention",
        _set("enable_dp_attention"),
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
    Refusal(
        "--enable-lora",
        _set("enable_lora"),
        "adapters are cut by SGLang's own KV-head count",
        _DROP,
    ),
    Refusal(
        "--enable-two-batch-overlap",
        _set("enable_two_batch_overlap"),
        "two batches would share one local table",
        _DROP,
    ),
    Refusal("--enable-pdmux", _set("enable_pdmux"), "not tested", _DROP),
    Refusal("--dllm-algorithm", _set("dllm_algorithm"), "not causal", _DROP),
    Refusal(
        "--kv-canary", _canary, "it checks logical slots against one rank's pool", _DROP
    ),
    Refusal(
        "--elastic-ep-backend",
        _set("elastic_ep_backend"),
        "groups would change after start",
        _DROP,
    ),
    Refusal(
        "--use-ray",
        _set("use_ray"),
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


def check_backend(name: str, need: Need, *, flag: str = "--attention-backend") -> None:
    """Refuse backend `name`, given by `flag`, where it cannot serve `need`."""
    problem = unmet(name, need)
    if problem is None:
        return
    others = adaptor_names(need)
    if not others:
        problem = _unmet_by_all(name, need) or problem
        way_out = _ELSE[problem.flag]
    elif problem.flag == "--attention-backend":
        problem = problem._replace(flag=flag)
        way_out = f"use {', '.join(others)}"
    else:
        way_out = f"use --attention-backend {' or '.join(others)}"
    refuse(problem.flag, problem.value, problem.reason, way_out)


def _unmet_by_all(name: str, need: Need) -> Optional[Unmet]:
    """The one part of `need` without which a backend could serve, if there is one."""
    for part in ("kv_dtype", "head_dim", "dtype"):
        unknown: dict[str, Any] = {part: None}
        if could := adaptor_names(need._replace(**unknown)):
            return unmet(name if name in could else could[0], need)
    return None


# Where no attention backend meets a need.
_ELSE = {
    "--attention-backend": "serve this model without DCP",
    "--dtype": "use --dtype bfloat16",
    "--kv-cache-dtype": "use --kv-cache-dtype auto and a checkpoint without fp8 K/V",
    "--model-path": "serve this model without DCP",
}


def check_table(refusals: tuple[Refusal, ...], subject: Any) -> None:
    """Raise for the first entry of `refusals` that speaks for `subject`."""
    for refusal in refusals:
        value = refusal.value(subject)
        if value is not None:
            refuse(refusal.flag, value, refusal.reason, refusal.way_out)


def refuse(flag: str, value: Any, reason: str, way_out: str) -> None:
    """Raise `DcpConfigError` with flag, value, reason and way out."""
    shown = "" if value is True else f" {value}"
    raise DcpConfigError(f"{flag}{shown} does not work with DCP: {reason}; {way_out}")
