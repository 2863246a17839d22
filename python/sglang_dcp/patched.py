"""What a patched SGLang calls: a seam of `seams.py`, written into its source.

SGLang's modules import this while they load, so neither this module nor those that hold
our functions import SGLang. `server_args` does, and is imported at the first call.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable, TypeVar

from sglang_dcp.seams import CPU_SEAMS, SEAMS, Kind, Seam

T = TypeVar("T")

_TABLE = {seam.name: seam for seam in SEAMS + CPU_SEAMS}
_CPU_NAMES = {seam.name for seam in CPU_SEAMS}
_PLACED: dict[str, Any] = {}

# Methods of ServerArgs, each with the function of `server_args` that stands around it.
_SERVER_ARGS = {
    "__post_init__": "around_post_init",
    "from_cli_args": "around_from_cli_args",
    "post_capture_kv_sizing_planned": "around_post_capture_kv_sizing_planned",
    "_get_default_attn_backend": "around_get_default_attn_backend",
    "__setstate__": "around_setstate",
}


def seam(*names: str) -> Callable[[T], T]:
    """Put seams on a function, method, value or `ServerArgs`.

    Parameters
    ----------
    *names : str
        Of `seams.py`, which says what each is for. More than one where SGLang reaches
        one object by several names.

    Returns
    -------
    callable
        From SGLang's object to the one that takes its place, as the plugin would have
        put it there. A seam of the CPU set-up leaves it alone where torch sees an
        accelerator.

    Raises
    ------
    ImportError
        For a name that this sglang-dcp does not have.
    """
    if unknown := [name for name in names if name not in _TABLE]:
        raise ImportError(
            f"this SGLang was patched by another sglang-dcp: seam {unknown[0]} is not of "
            "this one; reinstall SGLang, then run python -m sglang_dcp patch apply"
        )
    found = [_TABLE[name] for name in names]

    def place(original: T) -> T:
        placed = original
        if found[0].name not in _CPU_NAMES or not _sees_accelerator():
            placed = _put(found[0], original)
        _PLACED.update(dict.fromkeys(names, placed))
        return placed

    return place


def provided(seam: Seam) -> bool:
    """Whether SGLang's source holds this seam; imports the module that would."""
    importlib.import_module(seam.module)
    return seam.name in _PLACED


def placed(seam: Seam) -> Any:
    """What `seam` put in the place of SGLang's object."""
    return _PLACED[seam.name]


def _sees_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def _put(seam: Seam, original: Any) -> Any:
    if seam.kind is Kind.REPLACE:
        return _extend_server_args(original)
    # Not at the first call: that may come while torch.compile traces a model.
    ours = seam.load()
    if seam.kind in (Kind.ATTRIBUTE, Kind.ENTRY):
        return ours
    return functools.wraps(original)(_WRAPPERS[seam.kind](ours, original))


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


def _extend_server_args(cls: Any) -> Any:
    """The class itself, so that pickles, fields and subclasses stay SGLang's."""
    for name, ours in _SERVER_ARGS.items():
        method = vars(cls).get(name, _update_state)
        if isinstance(method, classmethod):
            setattr(cls, name, classmethod(_method(method.__func__, ours)))
        else:
            setattr(cls, name, _method(method, ours))
    return cls


def _method(original: Callable[..., Any], ours: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        around = getattr(importlib.import_module("sglang_dcp.server_args"), ours)
        return around(functools.partial(original, self), self, *args, **kwargs)

    return call


def _update_state(self: Any, state: dict[str, Any]) -> None:
    """What unpickling does with a class that has no `__setstate__`."""
    self.__dict__.update(state)
