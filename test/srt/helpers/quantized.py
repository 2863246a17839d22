"""Formats of quantized weights: how each stores a matrix, and what it stands for.

A format turns a matrix [outputs, inputs] into tensors of a checkpoint, by the suffix of
their names, and back. Quantizers and dequantizers are plain torch and know nothing of
SGLang. The dequantized matrix, in float64, is the oracle of every test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable

import torch

Tensors = dict[str, torch.Tensor]

BLOCK, GROUP, BITS = 128, 128, 4
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Numbers of one int32 word, in AWQ's order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 32 // BITS


@dataclass(frozen=True)
class Format:
    """One format.

    `config` is what config.json has as `quantization_config`. None is a checkpoint in 16
    bit that `flags` quantize. `skip` is the key of `config` for modules left in 16 bit.
    """

    config: Mapping[str, Any] | None
    quantize: Callable[[torch.Tensor], Tensors]
    dequantize: Callable[[Tensors], torch.Tensor]
    skip: str = ""
    flags: str = ""


def _fp8_block(weight: torch.Tensor) -> Tensors:
    rows, cols = weight.shape
    pad = (0, -cols % BLOCK, 0, -rows % BLOCK)
    blocks = torch.nn.functional.pad(weight.float(), pad)
    blocks = blocks.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    fp8 = (blocks / scales[:, None, :, None]).to(FP8).flatten(2).flatten(0, 1)
    return {"weight": fp8[:rows, :cols].contiguous(), "weight_scale_inv": scales}


def _from_fp8_block(found: Tensors) -> torch.Tensor:
    weight, scales = found["weight"], found["weight_scale_inv"].double()
    whole = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.double() * whole[: weight.shape[0], : weight.shape[1]]


def _fp8_tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().max() / FP8_MAX
    return {"weight": (weight.float() / scale).to(FP8), "weight_scale": scale}


def _fp8_tensor_static(weight: torch.Tensor) -> Tensors:
    # Activations of the tiny models stay far below 16.
    return {**_fp8_tensor(weight), "input_scale": torch.tensor(16.0 / FP8_MAX)}


def _scaled(found: Tensors) -> torch.Tensor:
    """A scale for all outputs, or one for each."""
    return found["weight"].double() * found["weight_scale"].double()


def _fp8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / FP8_MAX
    return {"weight": (weight.float() / scale).to(FP8), "weight_scale": scale}


def _int8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    return {
        "weight": (weight.float() / scale).round().to(torch.int8),
        "weight_scale": scale,
    }


def pack(numbers: torch.Tensor, dim: int, order: tuple[int, ...]) -> torch.Tensor:
    """Pack numbers of 4 bits along `dim`, as int32: number order[i] goes to bits 4i."""
    groups = numbers.long().unflatten(dim, (-1, PER_WORD)).movedim(dim + 1, -1)
    shifts = torch.arange(PER_WORD) * BITS
    words = (groups[..., list(order)] << shifts).sum(-1)
    return words.where(words < 1 << 31, words - (1 << 32)).int()


def unpack(words: torch.Tensor, dim: int, order: tuple[int, ...]) -> torch.Tensor:
    """Undo `pack`."""
    shifts = torch.arange(PER_WORD) * BITS
    numbers = (words.long()[..., None] >> shifts) & ((1 << BITS) - 1)
    places = torch.tensor(order).argsort()
    return numbers[..., places].movedim(-1, dim + 1).flatten(dim, dim + 1)


_STRAIGHT = tuple(range(PER_WORD))


def _by_group(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().unflatten(1, (-1, GROUP))


def _symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from 0 to 15 around 8 [outputs, inputs], scales [outputs, groups]."""
    groups = _by_group(weight)
    scales = (groups.abs().amax(-1) / 7).half()
    numbers = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
    return numbers.flatten(1).long(), scales


def _awq(weight: torch.Tensor) -> Tensors:
    groups = _by_group(weight)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return {
        "qweight": pack(numbers.clamp(0, 15).flatten(1).T, 1, AWQ_ORDER),
        "qzeros": pack(zeros.T, 1, AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }


def _from_awq(found: Tensors) -> torch.Tensor:
    numbers = unpack(found["qweight"], 1, AWQ_ORDER).double()
    zeros = unpack(found["qzeros"], 1, AWQ_ORDER).double()
    zeros, scales = (
        part.repeat_interleave(GROUP, 0) for part in (zeros, found["scales"].double())
    )
    return ((numbers - zeros) * scales).T


def _gptq(weight: torch.Tensor) -> Tensors:
    numbers, scales = _symmetric(weight)
    inputs = weight.shape[1]
    # The stored zero is one less than 8.
    zeros = torch.full(scales.T.shape, 7)
    return {
        "qweight": pack(numbers.T, 0, _STRAIGHT),
        "qzeros": pack(zeros, 1, _STRAIGHT),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(inputs) // GROUP).int(),
    }


def _from_gptq(found: Tensors) -> torch.Tensor:
    numbers = unpack(found["qweight"], 0, _STRAIGHT).double()
    zeros = unpack(found["qzeros"], 1, _STRAIGHT).double() + 1
    group = found["g_idx"].long()
    return ((numbers - zeros[group]) * found["scales"].double()[group]).T


def _w4a16(weight: torch.Tensor) -> Tensors:
    numbers, scales = _symmetric(weight)
    return {
        "weight_packed": pack(numbers, 1, _STRAIGHT),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def _from_w4a16(found: Tensors) -> torch.Tensor:
    numbers = unpack(found["weight_packed"], 1, _STRAIGHT).double() - 8
    return numbers * found["weight_scale"].double().repeat_interleave(GROUP, 1)


def _compressed(
    kind: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    scheme = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
    }


def _each(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, **more}


def _each_token(bits: int, kind: str) -> dict[str, Any]:
    return _each(bits, kind, "token", symmetric=True, dynamic=True)


def _fp8_config(scheme: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": scheme, "fmt": "e4m3", **more}


FORMATS: Mapping[str, Format] = {
    "fp8-block": Format(
        _fp8_config("dynamic", weight_block_size=[BLOCK, BLOCK]),
        _fp8_block,
        _from_fp8_block,
        skip="ignored_layers",
    ),
    "fp8-tensor": Format(
        _fp8_config("dynamic"), _fp8_tensor, _scaled, skip="ignored_layers"
    ),
    "fp8-tensor-static": Format(
        _fp8_config("static"), _fp8_tensor_static, _scaled, skip="ignored_layers"
    ),
    "fp8-modelopt": Format(
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        _fp8_tensor_static,
        _scaled,
        skip="ignore",
    ),
    "fp8-channel": Format(
        _compressed(
            "float-quantized",
            _each(8, "float", "channel"),
            _each_token(8, "float"),
        ),
        _fp8_channel,
        _scaled,
        skip="ignore",
    ),
    "int8-channel": Format(
        _compressed("int-quantized", _each(8, "int", "channel"), _each_token(8, "int")),
        _int8_channel,
        _scaled,
        skip="ignore",
    ),
    "awq": Format(
        {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
        _from_awq,
        skip="modules_to_not_convert",
    ),
    "gptq": Format(
        {
            "quant_method": "gptq",
            "bits": BITS,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
        _gptq,
        _from_gptq,
    ),
    "w4a16": Format(
        _compressed(
            "pack-quantized", _each(BITS, "int", "group", group_size=GROUP), None
        ),
        _w4a16,
        _from_w4a16,
        skip="ignore",
    ),
}


def _in_16_bit(weight: torch.Tensor) -> Tensors:
    return {"weight": weight.bfloat16()}


# The loader fills a layer in 16 bit, which SGLang quantizes once it is whole.
ONLINE_FP8 = Format(
    None,
    _in_16_bit,
    lambda found: found["weight"].double(),
    flags="--quantization fp8",
)
