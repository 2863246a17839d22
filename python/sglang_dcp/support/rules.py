"""The rule for an unsupported case: its flag, its value, the reason and a hint.

The cases themselves are in `server`, `backends` and `models`.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, NoReturn, Optional

from sglang_dcp.config import DcpConfigError
from sglang_dcp.releases.installed import in_range, sglang_version

# Returns what to print after the flag, or None if the case does not apply.
Value = Callable[[Any], Optional[Any]]

DROP = "drop the flag, or run without --dcp-size / --attn-tp-size"


class Unsupported(NamedTuple):
    """One case that DCP does not serve.

    `value` returns what to print after the flag, or None if the case does not apply.
    `since` and `until` are the first release of SGLang with the flag, and the first one
    without it. A flag that a release lacks without being named here is an error.
    """

    flag: str
    value: Value
    reason: str
    hint: str
    since: Optional[str] = None
    until: Optional[str] = None


def given(name: str, *fine: Any) -> Value:
    """Apply to any truthy value of argument `name` that is not one of `fine`."""

    def value(args: Any) -> Optional[Any]:
        found = getattr(args, name)
        return found if found and found not in fine else None

    return value


def below(name: str, least: int) -> Value:
    """Apply to a number of argument `name` that is less than `least`."""

    def value(args: Any) -> Optional[int]:
        found: Optional[int] = getattr(args, name)
        return found if found is not None and found < least else None

    return value


def above(name: str, most: int) -> Value:
    """Apply to a number of argument `name` that is more than `most`."""

    def value(args: Any) -> Optional[int]:
        found: Optional[int] = getattr(args, name)
        return found if found is not None and found > most else None

    return value


def other_graph(phase: str, *fine: str) -> Value:
    """Apply to a CUDA graph backend of `phase` that is on and is not one of `fine`.

    The JSON wins over the flag. Once resolved, it is an object with both in it.
    """

    def value(args: Any) -> Optional[str]:
        name: Optional[str] = getattr(args, f"cuda_graph_backend_{phase}")
        config = args.cuda_graph_config
        if isinstance(config, dict):
            name = (config.get(phase) or {}).get("backend", name)
        elif config is not None:
            name = getattr(config, phase).backend
        return None if name in (None, "disabled", *fine) else name

    return value


def switched_on(variable: str) -> Value:
    """Apply if SGLang's environment variable `variable` is on."""

    def value(args: Any) -> Optional[str]:
        from sglang.srt.environ import envs

        return "1" if getattr(envs, variable).get() else None

    return value


def runs_on_gpu(device: Optional[str]) -> bool:
    """Whether a server of `--device` runs on GPUs; None if it is not chosen yet."""
    import torch

    if device is None:
        return bool(torch.accelerator.is_available())
    return device != "cpu"


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def rules_in_force(rules: tuple[Unsupported, ...]) -> tuple[Unsupported, ...]:
    """Return the rules whose flag the installed SGLang has."""
    release = sglang_version()
    return tuple(rule for rule in rules if in_range(release, rule.since, rule.until))


def check_rules(rules: tuple[Unsupported, ...], subject: Any) -> None:
    """Raise `DcpConfigError` for the first of `rules` that applies to `subject`."""
    for rule in rules_in_force(rules):
        value = rule.value(subject)
        if value is not None:
            raise_unsupported(rule.flag, value, rule.reason, rule.hint)


def raise_unsupported(flag: str, value: Any, reason: str, hint: str) -> NoReturn:
    """Raise `DcpConfigError` with flag, value, reason and hint. True is not printed."""
    shown = "" if value is True else f" {value}"
    raise DcpConfigError(f"{flag}{shown} does not work with DCP: {reason}; {hint}")
