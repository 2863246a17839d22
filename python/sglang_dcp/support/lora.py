"""LoRA adapters that do not work with DCP.

Adapters come by `--enable-lora`, by `--lora-paths`, or at run time. SGLang takes one at run
time only where LoRA was on at start, and only for the layers that were chosen at start.
"""

from __future__ import annotations

from typing import Any, Iterable, Iterator, Optional

from sglang_dcp.support.rules import Unsupported, Value, raise_unsupported

_LATENTS = "kv_b_proj"
# SGLang's name for every layer, and peft's.
_ALL = ("all", "all-linear")


def _lora_flag(args: Any) -> Optional[str]:
    """Return the flag that turns LoRA on, or None if it is off.

    SGLang turns it on for `--lora-paths`, unless it was turned off by name.
    """
    if args.enable_lora:
        return "--enable-lora"
    return "--lora-paths" if args.lora_paths and args.enable_lora is None else None


def _beside_replicated_q(flag: str) -> Value:
    def value(args: Any) -> Optional[str]:
        named = _lora_flag(args) == flag
        replicated = named and args.dcp.replicate_q_proj
        return "with --dcp-replicate-q-proj" if replicated else None

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
        for flag in ("--enable-lora", "--lora-paths")
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
    if _lora_flag(args) is None:
        return
    targets = args.lora_target_modules or ()
    if _expands(targets):
        _raise_latents("--lora-target-modules", " ".join(sorted(targets)))
    from sglang.srt.lora.lora_config import LoRAConfig

    # Without the flag, SGLang takes the layers of the adapters.
    for name, path in () if targets else _named_paths(args.lora_paths or ()):
        found = LoRAConfig(path).target_modules
        if _expands([found] if isinstance(found, str) else found):
            _raise_latents("--lora-paths", f"{name} for {_LATENTS}")


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


def _expands(targets: Iterable[str]) -> bool:
    return any(name in _ALL or name.split(".")[-1] == _LATENTS for name in targets)


def _raise_latents(flag: str, value: str) -> None:
    raise_unsupported(
        flag,
        value,
        f"a prefill expands gathered latents, and an adapter of {_LATENTS} would take "
        "their rows for new tokens",
        f"name the adapters' layers in --lora-target-modules, without {_LATENTS}",
    )
