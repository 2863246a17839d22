"""SGLang's parallel sizes, ranks and groups, as a test needs them."""

from __future__ import annotations

from typing import Any, ContextManager

from sglang_dcp.releases.installed import in_range, sglang_version

# What 0.5.21 and later read where groups are made, beside the sizes of `init_groups`.
_NOT_SPLIT = dict(
    attn_cp_size=1,
    attn_dcp_size=1,
    attn_dp_size=1,
    moe_dp_size=1,
    moe_ep_size=1,
    shared_experts_tp_size=None,
)


def attention_width(
    ranks: int, rank: int = 0, replicas: int = 1
) -> ContextManager[Any]:
    """SGLang's readers see rank `rank` of `ranks` for attention.

    They are all ranks, or those of the last of `replicas` of DP attention.
    """
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().override(
        tp_size=ranks * replicas,
        tp_rank=ranks * (replicas - 1) + rank,
        attn_tp_size=ranks,
        attn_tp_rank=rank,
        moe_tp_size=ranks * replicas,
    )


def init_groups(tp_size: int, pp_size: int = 1, backend: str | None = None) -> None:
    """Make SGLang's groups in an initialised world. The hook makes DCP's beside them."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import get_parallel

    sizes: dict[str, int] = {}
    if in_range(sglang_version(), None, "0.5.21"):
        sizes["tensor_model_parallel_size"] = tp_size
        sizes["pipeline_model_parallel_size"] = pp_size
    else:
        get_parallel().override_permanently(
            tp_size=tp_size,
            pp_size=pp_size,
            attn_tp_size=tp_size,
            moe_tp_size=tp_size,
            **_NOT_SPLIT,
        )
    parallel_state.initialize_model_parallel(backend=backend, **sizes)


def leave_groups() -> None:
    """Undo `init_groups`, so that groups of other sizes can come."""
    from sglang.srt.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    # With the groups, 0.5.21 and later forget the world. This shows it to them again.
    parallel_state.init_distributed_environment()
