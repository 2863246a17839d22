"""The door of GPU tests to pages that once held infinities opens both kinds of pools.

Only this file sees on a CPU that such servers would run over what they are said to run over.
"""

from __future__ import annotations

import importlib
import sys
from functools import partialmethod
from typing import Any

import pytest
import torch

from helpers.backend_ranks import sglang_context
from helpers.doors import with_door
from helpers.infinities_door import TARGETS

SIZES = dict(size=8, page_size=1, layer_num=2, device="cpu", enable_memory_saver=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang does with the hooks of a plugin, undone after the test."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found: dict[str, Any] = {}

    def register(target: str, hook: Any, kind: Any) -> None:
        assert kind is HookType.AROUND
        found[target] = hook

    monkeypatch.setattr(HookRegistry, "register", register)
    plugin: dict[str, Any] = {}
    exec(with_door("def load(): ...", "infinities_door"), plugin)
    plugin["load"]()
    assert {*found} == {*TARGETS}
    for target, hook in found.items():
        module, kind, method = target.rsplit(".", 2)
        pool = getattr(importlib.import_module(module), kind)
        original = vars(pool)[method]

        def around(
            self: Any, *args: Any, hook: Any, original: Any, **kwargs: Any
        ) -> None:
            hook(original, self, *args, **kwargs)

        changed = partialmethod(around, hook=hook, original=original)
        monkeypatch.setattr(pool, method, changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_pools_hold_no_number(dtype: torch.dtype, opened: None) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    with sglang_context("cpu"):
        heads = MHATokenToKVPool(head_num=2, head_dim=4, dtype=dtype, **SIZES)
        latents = MLATokenToKVPool(
            kv_lora_rank=4, qk_rope_head_dim=2, dtype=dtype, **SIZES
        )
        read = [
            pool.get_key_buffer(layer) for pool in (heads, latents) for layer in (0, 1)
        ]
        read += [heads.get_value_buffer(layer) for layer in (0, 1)]
    for buffer in read:
        assert buffer.dtype == dtype and not buffer.float().isfinite().any()


def test_doors_are_opened_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import gpu_cases, infinities_door, replication_door

    order: list[str] = []
    for door in (replication_door, infinities_door):
        name = door.__name__
        monkeypatch.setattr(door, "open_door", lambda name=name: order.append(name))
    numbers = gpu_cases.Numbers("", "", source="def load(): ...")
    case = gpu_cases.Case("llama", gpu_cases.TP2_DCP2, "", "", numbers)
    both = gpu_cases.behind_door(case, "replication_door", "infinities_door")
    plugin: dict[str, Any] = {}
    exec(both.plugin, plugin)
    plugin["load"]()
    assert order == ["helpers.replication_door", "helpers.infinities_door"]
    assert both.plugin.count("def load():") == 1


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
