"""Attention backends that cannot serve what a server needs, and which could."""

from __future__ import annotations

from typing import Any, Optional

from sglang_dcp.layers.adaptors.registry import Need, Unmet, adaptor_names, unmet
from sglang_dcp.refusals import refuse


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
