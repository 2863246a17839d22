"""The calls that `bench_prefill_forms.py` and `bench_verification.py` time.

They run on a CPU with stand-ins for FA3.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import bench_prefill_forms as forms
import bench_verification as verification

PREFIX, NEW = 64, 5
ALONE = forms.Turns(1, PREFIX, NEW)


class Kernels(ModuleType):
    """Stands in for the module of FA3, and keeps what it is called with."""

    def __init__(self) -> None:
        super().__init__("sgl_kernel.flash_attn")
        self.calls: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(self, **given: Any) -> None:
        self.calls.append(given)

    flash_attn_varlen_func = flash_attn_with_kvcache


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", made)
    for module in (forms, verification):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    return made


def shapes(given: dict[str, Any], *names: str) -> list[tuple[int, ...]]:
    return [tuple(given[name].shape) for name in names]


def test_latents_in_place_are_attended_to_by_heads_of_the_group(
    kernels: Kernels,
) -> None:
    forms.in_place(forms.sizes_of("DeepSeek-V2-Lite"), ALONE)()
    [given] = kernels.calls
    assert shapes(given, "q", "qv") == [(NEW, 16, 64), (NEW, 16, 512)]
    assert shapes(given, "k_cache", "v_cache") == [(32, 1, 1, 64), (32, 1, 1, 512)]
    assert sorted(given["page_table"].flatten().tolist()) == list(range(PREFIX // 2))
    assert given["cu_seqlens_q"].tolist() == [0, NEW] and not given["causal"]


def test_gathered_prefixes_are_attended_to_by_heads_of_the_rank(
    kernels: Kernels,
) -> None:
    for name in ("DeepSeek-V2-Lite", "Qwen3-30B-A3B/4"):
        forms.gathered(forms.sizes_of(name), ALONE)()
    latents, heads = kernels.calls
    assert shapes(latents, "q", "k", "v") == [(NEW, 8, 192), (64, 8, 192), (64, 8, 128)]
    assert shapes(heads, "q", "k", "v") == [(NEW, 4, 128), (64, 1, 128), (64, 1, 128)]
    assert heads["cu_seqlens_k"].tolist() == [0, PREFIX]


@pytest.mark.parametrize("split", [True, False])
def test_keys_of_a_short_turn_are_split_unless_they_are_whole(
    split: bool, kernels: Kernels
) -> None:
    for name in ("DeepSeek-V2-Lite", "Qwen3-30B-A3B/4"):
        forms.gathered(forms.sizes_of(name), forms.Turns(1, 8192, NEW), split=split)()
    assert all((given["num_splits"] > 1) == split for given in kernels.calls)


def test_each_request_of_a_batch_has_a_prefix_of_its_own(kernels: Kernels) -> None:
    turns = forms.Turns(3, PREFIX, NEW)
    forms.in_place(forms.sizes_of("DeepSeek-V2-Lite"), turns)()
    forms.gathered(forms.sizes_of("DeepSeek-V2-Lite"), turns)()
    pages, ragged = kernels.calls
    assert shapes(pages, "q", "page_table") == [(15, 16, 64), (3, 32)]
    assert pages["cu_seqlens_q"].tolist() == [0, 5, 10, 15]
    assert pages["page_table"].unique().numel() == 96
    assert shapes(ragged, "q", "k") == [(15, 8, 192), (192, 8, 192)]
    assert ragged["cu_seqlens_k"].tolist() == [0, 64, 128, 192]


def test_latents_are_expanded_as_attention_takes_them(kernels: Kernels) -> None:
    sizes = forms.sizes_of("DeepSeek-V2-Lite")
    k, v = forms.expand(sizes, PREFIX)()
    assert k.shape == (PREFIX, 8, 192) and v.shape == (PREFIX, 8, 128)
    # All heads share the rotary part.
    rope: Tensor = k[..., sizes.nope :]
    assert torch.equal(rope, rope[:, :1].expand_as(rope))
    q, out = forms.absorb(sizes, NEW)()
    assert q.shape == (8, NEW, 512) and out.shape == (8, NEW, 128)


def test_a_line_for_each_size(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(forms, "microseconds", lambda *call, **more: 7.0)
    forms.main(["--prefixes", "64", "--new", "5", "7"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "Qwen3-30B-A3B/4,1,64,5,7.0,7.0,7.0,0.0,0.0",
        "Qwen3-30B-A3B/4,1,64,7,7.0,7.0,7.0,0.0,0.0",
        "DeepSeek-V2-Lite,1,64,5,7.0,7.0,7.0,7.0,7.0",
        "DeepSeek-V2-Lite,1,64,7,7.0,7.0,7.0,7.0,7.0",
    ]


@pytest.mark.parametrize("name", verification.NAMES)
def test_tokens_of_a_verification_are_rows_or_more_heads(
    name: str, kernels: Kernels
) -> None:
    heads, width, batch = verification.heads_of(name), 4, 3
    keys = verification.make_keys(heads, PREFIX, batch, 1)
    rows, folded = (batch * width, heads.heads), (batch, heads.heads * width)
    for sizes in (rows, folded):
        verification.attention(heads, keys, *sizes)()
    for given, sizes in zip(kernels.calls, (rows, folded)):
        assert shapes(given, "q") == [(*sizes, heads.qk)]
        assert shapes(given, "page_table") == [(sizes[0], PREFIX // 2)]
        assert given["cache_seqlens"].tolist() == [PREFIX // 2] * sizes[0]
        assert (given["qv"] is not None) == heads.latent
    # A request's rows see its own keys.
    table = kernels.calls[0]["page_table"]
    assert torch.equal(table[:width], table[:1].expand(width, -1))
    assert table[::width].unique().numel() == batch * PREFIX // 2


@pytest.mark.parametrize("name", verification.NAMES)
def test_a_chain_attends_to_itself_with_the_ranks_heads(
    name: str, kernels: Kernels
) -> None:
    heads = verification.heads_of(name)
    out = verification.chain(heads, 1, 8)()
    assert out.shape == (8, heads.heads // 2, heads.v)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
