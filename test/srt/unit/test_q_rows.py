"""A rank's own outputs of a replicated Q projection: which layouts are cut, which not.

Only this file looks at layouts that SGLang makes on GPUs alone: packed scales, blocks that
a cut would split, scales that kernels could not load.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.quantized import FORMATS
from sglang_dcp.layers.q_rows import apply_rows, row_view

HIDDEN, ROWS = 512, 1024
PARTS = (slice(256, 512), slice(768, 1024))


def plain(dtype: torch.dtype = torch.float64) -> Any:
    weight = torch.randn(ROWS, HIDDEN, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(weight=torch.nn.Parameter(weight.to(dtype), False))


def block_fp8(**more: Any) -> Any:
    stored = FORMATS["fp8-block"].quantize(plain(torch.float32).weight.data)
    found = {name: torch.nn.Parameter(t, False) for name, t in stored.items()}
    return SimpleNamespace(**{**found, **more})


def method_of(kind: str, **more: Any) -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    if kind == "plain":
        return UnquantizedLinearMethod()
    method: Any = Fp8LinearMethod.__new__(Fp8LinearMethod)
    method.block_quant = True
    method.quant_config = SimpleNamespace(weight_block_size=[128, 128])
    vars(method).update(more)
    return method


class Subclass(torch.Tensor):
    """As torchao's tensors, which may not be cut."""


def test_plain_rows(plugins: None) -> None:
    layer, method = plain(), method_of("plain")
    bias = torch.arange(ROWS).double()
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2)).double()
    whole = x @ layer.weight.T + bias
    want = torch.cat([whole[:, part] for part in PARTS], dim=1)
    torch.testing.assert_close(apply_rows(method, layer, PARTS, x, bias), want)
    view = row_view(method, layer, PARTS[0])
    assert view is not None
    assert view.weight.data_ptr() == layer.weight[256:].data_ptr()


def test_rows_that_are_not_plain_are_computed_whole(plugins: None) -> None:
    method = method_of("plain")
    layer = plain()
    layer.weight = SimpleNamespace(data=layer.weight.data.as_subclass(Subclass))
    assert row_view(method, layer, PARTS[0]) is None
    layer = plain()
    layer.use_intel_amx_backend = True
    assert row_view(method, layer, PARTS[0]) is None


def test_a_method_that_is_not_known_computes_all(plugins: None) -> None:
    """Also a subclass of a known one: it may have another layout."""
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    class Other(UnquantizedLinearMethod):
        def apply(self, layer: Any, x: Any, bias: Any = None) -> torch.Tensor:
            assert len(layer.weight) == ROWS
            return torch.arange(ROWS).expand(2, -1)

    found = apply_rows(Other(), plain(), PARTS, torch.zeros(2, HIDDEN), None)
    assert torch.equal(found[1], torch.cat([torch.arange(ROWS)[p] for p in PARTS]))
    one = apply_rows(Other(), plain(), PARTS[:1], torch.zeros(2, HIDDEN), None)
    assert one.is_contiguous() and torch.equal(one[0], torch.arange(ROWS)[PARTS[0]])


@pytest.mark.parametrize("part", [*PARTS, slice(0, 128), slice(0, ROWS)], ids=str)
def test_rows_of_fp8_blocks(part: slice, plugins: None) -> None:
    form, layer = FORMATS["fp8-block"], block_fp8()
    view = row_view(method_of("fp8"), layer, part)
    assert view is not None
    found = {n: getattr(view, n).data for n in ("weight", "weight_scale_inv")}
    whole = {n: getattr(layer, n).data for n in found}
    assert torch.equal(form.dequantize(found), form.dequantize(whole)[part])


@pytest.mark.parametrize(
    ("part", "layer", "method"),
    [
        pytest.param(slice(64, 256), {}, {}, id="inside-a-block"),
        pytest.param(slice(128, 192), {}, {}, id="ends-inside-a-block"),
        pytest.param(PARTS[0], {}, {"use_marlin": True}, id="marlin"),
        pytest.param(PARTS[0], {}, {"use_mxfp8": True}, id="mxfp8"),
        pytest.param(PARTS[0], {}, {"block_fp8_as_mxfp8": True}, id="as-mxfp8"),
        pytest.param(PARTS[0], {}, {"block_quant": False}, id="tensor-scales"),
        pytest.param(
            PARTS[0], {"_block_fp8_bf16_weight": torch.zeros(1)}, {}, id="expanded"
        ),
        pytest.param(
            PARTS[0],
            {"weight_scale_inv": torch.zeros(4, 8, dtype=torch.int32)},
            {},
            id="packed-scales",
        ),
        pytest.param(
            PARTS[0],
            {"weight_scale_inv": torch.zeros(ROWS, 4)},
            {},
            id="scales-of-other-blocks",
        ),
    ],
)
def test_blocks_that_are_computed_whole(
    part: slice, layer: dict[str, Any], method: dict[str, Any], plugins: None
) -> None:
    assert row_view(method_of("fp8", **method), block_fp8(**layer), part) is None


def test_scales_as_powers_of_two_are_computed_whole(plugins: None) -> None:
    """A view would lose the mark that tells a kernel how to read them."""
    layer = block_fp8()
    layer.weight_scale_inv.format_ue8m0 = True
    assert row_view(method_of("fp8"), layer, PARTS[0]) is None


def test_scales_off_the_alignment_are_computed_whole(plugins: None) -> None:
    """3 scales of 4 bytes in a row: block 2 starts at byte 24, and block 4 at byte 48."""
    weight = plain(torch.float32).weight.data[:, :384]
    stored = FORMATS["fp8-block"].quantize(weight)
    layer = SimpleNamespace(
        **{n: torch.nn.Parameter(t, False) for n, t in stored.items()}
    )
    assert row_view(method_of("fp8"), layer, slice(256, 512)) is None
    assert row_view(method_of("fp8"), layer, slice(512, 1024)) is not None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
