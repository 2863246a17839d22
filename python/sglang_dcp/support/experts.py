"""What DCP serves of DP attention and of the ways in which MoE layers exchange tokens.

A MoE layer gets the tokens that SGLang scatters over the ranks which ran their attention,
after the output projection. The next attention gets them gathered again. So whatever
moves tokens to experts is beyond DCP, where SGLang itself serves it on several ranks of
attention.
"""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.support.architectures import DP_ATTENTION
from sglang_dcp.support.rules import (
    Unsupported,
    Value,
    check_rules,
    raise_unsupported,
)

# How the configs of the served models call the number of their experts.
_NUMBERS_OF_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
_BACKEND = "--moe-a2a-backend"
_NONE = "use --moe-a2a-backend none, with any --ep-size"


def has_experts(model: Any) -> bool:
    """Whether a model routes tokens to experts. `model` is SGLang's `ModelConfig`."""
    text = model.hf_text_config
    return any(getattr(text, name, None) for name in _NUMBERS_OF_EXPERTS)


def _one_of(*names: str) -> Value:
    def value(args: Any) -> Optional[str]:
        name: Optional[str] = args.moe_a2a_backend
        return name if name in names else None

    return value


def _without_gpu(args: Any) -> Optional[str]:
    name: Optional[str] = args.moe_a2a_backend
    exchanges = name not in (None, "none") and args.device == "cpu"
    return f"{name} on a CPU" if exchanges else None


def _speculation_beside_scatter(args: Any) -> Optional[str]:
    scatters = (
        args.moe_a2a_backend not in (None, "none")
        or args.moe_dense_tp_size
        or args.enable_attn_tp_input_scattered
    )
    if not args.speculative_algorithm or not scatters:
        return None
    return f"{args.speculative_algorithm} with scattered tokens"


def _replicas(args: Any) -> Optional[bool]:
    return True if args.dcp.layout.replicas > 1 else None


UNSUPPORTED_EXPERTS: tuple[Unsupported, ...] = (
    Unsupported(
        _BACKEND,
        _one_of("flashinfer", "flashinfer_megamoe"),
        "SGLang runs it only where each replica of DP attention has one rank",
        "use --moe-a2a-backend deepep or none",
    ),
    Unsupported(
        _BACKEND,
        _one_of("mori", "ascend_fuseep", "ascend_tp"),
        "it is for AMD GPUs or Ascend NPUs",
        "use --moe-a2a-backend deepep or none",
    ),
    Unsupported(
        _BACKEND,
        _one_of("customized"),
        "the dispatcher of another plugin may take other tokens",
        _NONE,
    ),
    Unsupported(
        _BACKEND,
        _one_of("mooncake"),
        "its dispatcher needs elastic EP, whose groups change after start",
        "use --moe-a2a-backend deepep or none",
        until="0.5.23",
    ),
    Unsupported(_BACKEND, _without_gpu, "its library runs on GPUs", _NONE),
    Unsupported(
        "--speculative-algorithm",
        _speculation_beside_scatter,
        "SGLang pads the tokens of a draft, and no request has the padding",
        "drop it, or use --moe-a2a-backend none without --moe-dense-tp-size and "
        "--enable-attn-tp-input-scattered",
        since="0.5.23",
    ),
    Unsupported(
        "--enable-dp-attention",
        _replicas,
        "a server did not answer its first request on this release of SGLang",
        "use SGLang 0.5.23, or --dp-size replicas without DP attention",
        until="0.5.23",
    ),
)


def check_experts(args: Any) -> None:
    """Raise `DcpConfigError` for server arguments that DCP does not serve."""
    check_rules(UNSUPPORTED_EXPERTS, args)


def check_experts_of(args: Any, architecture: str) -> None:
    """Raise `DcpConfigError` if SGLang does not scatter tokens for the model's experts.

    Parameters
    ----------
    args
        Resolved server arguments, with `dcp` set.
    architecture : str
        A model that DCP serves.
    """
    if args.moe_a2a_backend in (None, "none") or architecture in DP_ATTENTION:
        return
    raise_unsupported(
        _BACKEND,
        f"{args.moe_a2a_backend} with {architecture}",
        "SGLang itself does not scatter tokens for this model's layers",
        _NONE,
    )
