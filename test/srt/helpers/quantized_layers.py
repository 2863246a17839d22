"""SGLang's own linear layers, quantized, as one rank of a layout builds and loads them.

No kernel runs: a layer's parameters after loading are read back by the plain dequantizers
of `helpers.quantized`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, ContextManager

import pytest
import torch

from helpers.parallel import attention_width
from helpers.quantized import BLOCK, ONLINE_FP8, PER_WORD, Format, Tensors
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.topology import Layout

# SGLang's name for a format, where it differs from `quant_method`.
_SERVED_AS = {"awq": "awq_marlin", "gptq": "gptq_marlin"}


def quant_config(form: Format) -> Any:
    """SGLang's configuration object, as its loader makes it from config.json."""
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    if form is ONLINE_FP8 or form.config is None:
        return Fp8Config(activation_scheme="dynamic")
    name = form.config["quant_method"]
    found = get_quantization_config(_SERVED_AS.get(name, name))
    # The loader adds the mapping, from the class of the model.
    return found.from_config({**form.config, "packed_modules_mapping": {}})


class Place:
    """Rank `rank` of a layout, with the Q projection replicated or not.

    With replicas of DP attention it is a rank of the last of them.
    """

    def __init__(self, layout: Layout, rank: int, replicated: bool) -> None:
        self.layout, self.rank, self.replicated = layout, rank, replicated

    def enter(self) -> None:
        clear_context()
        config = DcpConfig(self.layout, replicate_q_proj=self.replicated)
        set_context(DcpContext(config, self.rank))

    def width(self) -> ContextManager[Any]:
        """What SGLang's readers see on this rank."""
        layout = self.layout
        return attention_width(layout.tp_size, self.rank, layout.replicas)

    def _given(self, kind: type) -> dict[str, Any]:
        """Later releases read rank and size from the context."""
        names = inspect.signature(inspect.unwrap(vars(kind)["__init__"])).parameters
        place: dict[str, Any] = {"tp_rank": self.rank, "tp_size": self.layout.tp_size}
        if self.layout.replicas > 1:
            place = {"parallel_group": "attn_tp"}
        return {name: place[name] for name in place if name in names}

    def qkv_layer(
        self, form: Format, hidden: int, head_dim: int, heads: int, kv_heads: int
    ) -> Any:
        """As a model builds it: with the K/V heads of the scaled model config."""
        from sglang.srt.layers.linear import QKVParallelLinear

        self.enter()
        with self.width():
            return QKVParallelLinear(
                *(hidden, head_dim, heads, kv_heads * self.layout.dcp_size),
                bias=False,
                params_dtype=torch.float16,
                quant_config=quant_config(form),
                prefix="model.layers.0.self_attn.qkv_proj",
                **self._given(QKVParallelLinear),
            )

    def column_layer(self, form: Format, inputs: int, outputs: int, name: str) -> Any:
        """A projection of DeepSeek, sharded, as its model builds it."""
        from sglang.srt.layers.linear import ColumnParallelLinear

        self.enter()
        with self.width():
            return ColumnParallelLinear(
                inputs,
                outputs,
                bias=False,
                params_dtype=torch.float16,
                quant_config=quant_config(form),
                prefix=f"model.layers.0.self_attn.{name}",
                **self._given(ColumnParallelLinear),
            )


def load(layer: Any, tensors: Mapping[str, torch.Tensor], *part: str) -> None:
    """Load one matrix of a checkpoint, `part` of a fused layer, by SGLang's loaders."""
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor, *part)


def read_back(form: Format, layer: Any) -> torch.Tensor:
    """The matrix that a loaded layer stands for, [outputs, inputs] in float64."""
    found: Tensors = {n: p.data for n, p in layer.named_parameters()}
    scale = found.get("weight_scale")
    widths = layer.output_partition_sizes
    if scale is not None and scale.shape == (len(widths),):
        # One scale for each part of a fused layer.
        found["weight_scale"] = scale.repeat_interleave(torch.tensor(widths))[:, None]
    return form.dequantize(found)


def fits(form: Format, rows: int) -> bool:
    """Whether a layer with `rows` outputs of one part can be cut there."""
    block = "weight_scale_inv" in form.quantize(torch.ones(BLOCK, BLOCK))
    return rows % (BLOCK if block else PER_WORD) == 0


_MARLIN = (
    "sglang.srt.layers.quantization.awq.awq",
    "sglang.srt.layers.quantization.gptq.schemes.gptq_marlin",
)


def build_as_on_hopper(patch: pytest.MonkeyPatch) -> None:
    """Let SGLang build the layers that it builds on a Hopper GPU. None of them can run."""
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in _MARLIN:
        module = importlib.import_module(name)
        patch.setattr(module, "verify_marlin_supported", lambda *_, **__: None)
    from sglang.srt.layers.quantization.awq import AWQMarlinConfig
    from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig

    for kind, name in ((AWQMarlinConfig, "awq"), (GPTQMarlinConfig, "gptq")):

        def converts(cls: type, config: Mapping[str, Any], name: str = name) -> bool:
            return config.get("quant_method") == name

        patch.setattr(kind, f"is_{name}_marlin_compatible", classmethod(converts))


def keep_as_loaded() -> None:
    """Let SGLang leave all weights of this process as its loaders wrote them."""
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

    def of(kind: type) -> Iterator[type]:
        yield kind
        for below in kind.__subclasses__():
            yield from of(below)

    for kind in of(QuantizeMethodBase):
        if "process_weights_after_loading" in vars(kind):
            setattr(kind, "process_weights_after_loading", lambda self, layer: None)
