"""Rejects the DCP flags on a release of SGLang that this package does not know.

No hook is installed there. SGLang has a `--dcp-size` of its own, which would be taken for
ours, so it is rejected too.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, Optional

from sglang_dcp.config import DcpConfigError

_FLAGS = (
    "--dcp-size",
    "--decode-context-parallel-size",
    "--attn-tp-size",
    "--attention-tensor-parallel-size",
    "--dcp-comm-backend",
    "--dcp-replicate-q-proj",
    "--no-dcp-replicate-q-proj",
)
_ARGUMENTS = ("dcp_size", "attn_tp_size", "dcp_comm_backend", "dcp_replicate_q_proj")

_OWN_DCP = "; for SGLang's own DCP uninstall sglang-dcp, or list other SGLANG_PLUGINS"


def reject_flags(reason: str) -> None:
    """Make the command line and `sgl.Engine` reject the DCP flags with `reason`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    targets: dict[str, Callable[..., None]] = {
        "sglang.srt.server_args.prepare_server_args": check_command_line,
        "sglang.srt.entrypoints.engine.Engine.__init__": check_engine,
    }
    for target, check in targets.items():
        HookRegistry.register(target, functools.partial(check, reason), HookType.BEFORE)


def check_command_line(reason: str, argv: list[str], *args: Any, **kwargs: Any) -> None:
    """Exit with 2 if `argv` has one of our flags, also shortened or in `--config`."""
    words = [*argv, *_words_of_config(argv)]
    given = next((word for word in words if _is_exact(word)), None)
    given = given or _shortened(words)
    if given:
        print(f"sglang-dcp: error: {given}: {reason}{_OWN_DCP}", file=sys.stderr)
        sys.exit(2)


def _is_exact(word: str) -> bool:
    return word.split("=")[0] in _FLAGS


def _words_of_config(argv: list[str]) -> Iterable[str]:
    """Return the flags of the file that `--config` names.

    A file that cannot be read, or that is no mapping, is left to SGLang, which rejects it.
    """
    for word, following in zip(argv, [*argv[1:], ""]):
        name, _, value = word.partition("=")
        path = Path(value or following)
        if name == "--config" and path.is_file():
            yield from _flags_in(path)


def _flags_in(path: Path) -> Iterable[str]:
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return
    if isinstance(content, dict):
        yield from (f"--{key}".replace("_", "-") for key in content)


def _shortened(words: Iterable[str]) -> Optional[str]:
    """Return the first word that SGLang's parser could only take for one of our flags.

    The parser accepts the beginning of a flag, if no other flag begins so.
    """
    short = [word for word in words if _begins_one_of(word, _FLAGS)]
    if not short:
        return None
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    others = set(parser._option_string_actions) - set(_FLAGS)
    return next((word for word in short if not _begins_one_of(word, others)), None)


def _begins_one_of(word: str, flags: Iterable[str]) -> bool:
    name = word.split("=")[0]
    return name.startswith("--") and any(flag.startswith(name) for flag in flags)


def check_engine(reason: str, engine: Any, *args: Any, **kwargs: Any) -> None:
    """Raise DcpConfigError if `sgl.Engine` gets one of our arguments."""
    given = [name for name in _ARGUMENTS if kwargs.get(name) is not None]
    if getattr(kwargs.get("server_args"), "dcp_size", None) not in (None, 1):
        given.append("dcp_size")
    if given:
        raise DcpConfigError(f"{given[0]}: {reason}{_OWN_DCP}")
