"""The inline form of a hook: a decorator that a patched SGLang has in its source.

SGLang's modules import this file while they load. So neither this module nor the modules
of our hook functions import SGLang at module level.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable, TypeVar

from sglang_dcp.hooks.table import CPU_HOOKS, HOOKS, Hook, Kind

T = TypeVar("T")

_TABLE = {hook.name: hook for hook in HOOKS + CPU_HOOKS}
_CPU_NAMES = {hook.name for hook in CPU_HOOKS}
_INSTALLED: dict[str, Any] = {}


def hook(*names: str) -> Callable[[T], T]:
    """Install hooks on a function, method, value or `ServerArgs`.

    Parameters
    ----------
    *names : str
        Names of hooks in `table.py`. There are several if SGLang reaches one object by
        several names.

    Returns
    -------
    callable
        A decorator. It returns the object that the plugin would have put in the place
        of SGLang's. With a hook of the CPU set-up it returns SGLang's object, if torch
        sees an accelerator.

    Raises
    ------
    ImportError
        This sglang-dcp has no hook of that name.
    """
    if unknown := [name for name in names if name not in _TABLE]:
        raise ImportError(
            f"this SGLang was patched by another sglang-dcp: this one has no hook "
            f"{unknown[0]}; reinstall SGLang, then run python -m sglang_dcp patch apply"
        )
    first = _TABLE[names[0]]

    def install(original: T) -> T:
        installed = original
        if first.name not in _CPU_NAMES or not _sees_accelerator():
            installed = _wrap(first, original)
        _INSTALLED.update(dict.fromkeys(names, installed))
        return installed

    return install


def is_patched() -> bool:
    """Whether SGLang's source holds hooks, as far as its modules are loaded."""
    return bool(_INSTALLED)


def is_inline(hook: Hook) -> bool:
    """Whether SGLang's source holds this hook. Imports the module of its target."""
    importlib.import_module(hook.module)
    return hook.name in _INSTALLED


def inline_object(hook: Hook) -> Any:
    """Return what the inline form of `hook` put in the place of SGLang's object."""
    return _INSTALLED[hook.name]


def _sees_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _wrap(hook: Hook, original: Any) -> Any:
    if hook.kind is Kind.REPLACE:
        from sglang_dcp.hooks.server_args import extend_server_args

        return extend_server_args(original, original.__module__, original.__name__)
    # Loaded now, because the first call may come while torch.compile traces a model.
    ours = hook.load()
    if hook.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return ours
    return functools.wraps(original)(_WRAPPERS[hook.kind](ours, original))


def _before(ours: Any, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ours(*args, **kwargs)
        return original(*args, **kwargs)

    return call


def _after(ours: Any, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(original(*args, **kwargs), *args, **kwargs)

    return call


def _around(ours: Any, original: Any) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    return call


_WRAPPERS = {Kind.BEFORE: _before, Kind.AFTER: _after, Kind.AROUND: _around}
