"""LoRA adapters that do not work with DCP, or that were not compared with tp 1.

Adapters come by `--enable-lora`, by `--lora-paths`, or at run time. SGLang takes one at run
time only where LoRA was on at start, and only for the layers that were chosen at start.
"""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Optional

from sglang_dcp.support.experts import has_experts
from sglang_dcp.support.quantization import format_of
from sglang_dcp.support.rules import Unsupported, Value, raise_unsupported
from sglang_dcp.support.speculation import algorithm_of

_FLAGS = ("--enable-lora", "--lora-paths")
_LATENTS = "kv_b_proj"
# In a layer of experts these are the experts. SGLang wraps all of them or none.
_MLP = frozenset({"gate_proj", "up_proj", "gate_up_proj", "down_proj", "experts"})
# SGLang's name for every layer, and peft's.
_ALL = ("all", "all-linear")


def _lora_flag(args: Any) -> Optional[str]:
    """Return the flag that turns LoRA on, or None if it is off.

    SGLang turns it on for `--lora-paths`, unless it was turned off by name.
    """
    if args.enable_lora:
        return "--enable-lora"
    return "--lora-paths" if args.lora_paths and args.enable_lora is None else None


def _beside_replicas(flag: str) -> Value:
    def value(args: Any) -> Optional[str]:
        named = _lora_flag(args) == flag
        return "with DP attention" if named and args.dcp.layout.replicas > 1 else None

    return value


def _beside_replicated_q(flag: str) -> Value:
    def value(args: Any) -> Optional[str]:
        named = _lora_flag(args) == flag
        replicated = named and args.dcp.replicate_q_proj
        return "with --dcp-replicate-q-proj" if replicated else None

    return value


def _beside_speculation(flag: str) -> Value:
    def value(args: Any) -> Optional[str]:
        if _lora_flag(args) != flag or algorithm_of(args) is None:
            return None
        return f"with --speculative-algorithm {args.speculative_algorithm}"

    return value


def _backend_without_gpu(args: Any) -> Optional[str]:
    if _lora_flag(args) is None or args.device != "cpu":
        return None
    name: str = args.lora_backend
    return None if name == "torch_native" else f"{name} on a CPU"


UNSUPPORTED_LORA: tuple[Unsupported, ...] = (
    *(
        Unsupported(
            flag,
            _beside_replicated_q(flag),
            "an adapter would change the Q heads of one rank alone",
            "drop --dcp-replicate-q-proj",
        )
        for flag in _FLAGS
    ),
    *(
        Unsupported(
            flag,
            _beside_speculation(flag),
            "no server with adapters and drafts was compared with tp 1",
            "drop --speculative-algorithm, or the adapters",
        )
        for flag in _FLAGS
    ),
    *(
        Unsupported(
            flag,
            _beside_replicas(flag),
            "SGLang's adapters work only in replicas of one rank",
            "drop the adapters, or use --dp-size replicas without DP attention",
        )
        for flag in _FLAGS
    ),
    Unsupported(
        "--lora-backend",
        _backend_without_gpu,
        "its kernels need a GPU",
        "use --lora-backend torch_native",
    ),
)


def check_adapters_of_latents(args: Any) -> None:
    """Check the adapters of a model with latent attention (MLA).

    Parameters
    ----------
    args
        A `ServerArgs`.

    Raises
    ------
    DcpConfigError
        An adapter may change how latents are expanded.
    """
    if _lora_flag(args) is not None:
        _check_targets(
            args,
            _LATENTS,
            frozenset({_LATENTS}),
            "a prefill expands gathered latents, and an adapter of kv_b_proj would take "
            "their rows for new tokens",
            f"name the adapters' layers in --lora-target-modules, without {_LATENTS}",
        )


def check_adapters_of(args: Any, model: Any) -> None:
    """Check the adapters of a model with quantized weights, or with experts.

    Parameters
    ----------
    args
        A `ServerArgs`.
    model
        SGLang's `ModelConfig`.

    Raises
    ------
    DcpConfigError
        No server with such adapters was compared with tp 1.
    """
    flag = _lora_flag(args)
    if flag is None:
        return
    if (name := format_of(model)) is not None:
        raise_unsupported(
            flag,
            f"with {name} weights",
            "no server with adapters and quantized weights was compared with tp 1",
            "serve this model in 16 bit, or without adapters",
        )
    if has_experts(model):
        _check_targets(
            args,
            "experts",
            _MLP,
            "no server with adapters of experts was compared with tp 1",
            "name the layers of attention in --lora-target-modules, and take adapters of "
            "these alone",
        )


def _check_targets(
    args: Any, what: str, refused: frozenset[str], reason: str, hint: str
) -> None:
    """Raise if the layers that SGLang chooses for adapters are among `refused`."""
    targets = args.lora_target_modules or ()
    if _any_of(targets, refused):
        shown = " ".join(sorted(targets))
        raise_unsupported("--lora-target-modules", shown, reason, hint)
    from sglang.srt.lora.lora_config import LoRAConfig

    # Without the flag, SGLang takes the layers of the adapters.
    for name, path in () if targets else _named_paths(args.lora_paths or ()):
        found = LoRAConfig(path).target_modules
        if _any_of([found] if isinstance(found, str) else found, refused):
            raise_unsupported("--lora-paths", f"{name} for {what}", reason, hint)


def _named_paths(paths: Any) -> Iterator[tuple[str, str]]:
    """Yield name and path of each adapter, in every form that SGLang takes."""
    for entry in paths.items() if isinstance(paths, dict) else paths:
        if isinstance(entry, tuple):
            yield entry
        elif isinstance(entry, dict):
            yield entry["lora_name"], entry["lora_path"]
        elif isinstance(entry, str):
            name, equals, path = entry.partition("=")
            yield name, path if equals else name
        else:  # SGLang's `LoRARef`, once it resolved them
            yield entry.lora_name, entry.lora_path


def _any_of(targets: Iterable[str], refused: frozenset[str]) -> bool:
    return any(name in _ALL or name.split(".")[-1] in refused for name in targets)
