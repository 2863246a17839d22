"""`--dcp-replicate-q-proj`: the Q projection at attn_tp width, so decode gathers no Q.

SGLang builds, loads, updates and computes that projection itself: it is an ordinary layer
of `attn_tp_size` ranks. In decode each rank uses it whole, for the queries of its DCP
group. In extend it uses its local heads only, as without the flag.

MLA multiplies queries by `w_kc`, which SGLang derives from `kv_b_proj` after loading. That
layer stays sharded, so the `w_kc` of the other ranks are gathered.

Source: Helix, arXiv 2507.07120, section 2.1.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Callable, Optional

import torch
from torch import nn

from sglang_dcp.config import DcpConfigError
from sglang_dcp.context import DcpContext, find_context
from sglang_dcp.layers.absorbed_k import AbsorbedK
from sglang_dcp.layers.estimates import Product
from sglang_dcp.layers.heads import attn_tp_partition, qkv_layer_of
from sglang_dcp.layers.q_rows import apply_rows
from sglang_dcp.releases.api import sglang_api


def after_load_model(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: `ModelRunner.load_model`; finds the replicated Q projections that were loaded."""
    from sglang_dcp.distributed.groups import get_dcp_group

    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        runner.dcp_q_replicas = QReplicas(runner.model, get_dcp_group())
    return result


def around_weight_update(
    original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook: every `WeightUpdater.update_weights_from_*`; refreshes what was gathered.

    It does so after a failed update too, because all ranks must take part in the gather.
    """
    result = original(updater, *args, **kwargs)
    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        updater.get_model_runner().dcp_q_replicas.refresh()
    return result


def q_projections(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and the layer of each Q projection that can be replicated."""
    for name, module in model.named_modules():
        if _is_gqa_attention(module):
            layer: Any = qkv_layer_of(module)
            which = next(n for n, child in module.named_children() if child is layer)
            yield f"{name}.{which}", layer
        elif _is_mla_attention(module):
            which, layer = _q_of_mla(module)
            yield f"{name}.{which}", layer


def replicate_q_projections(model: nn.Module, context: DcpContext) -> None:
    """Build the Q projections of MLA again, at attn_tp width. No weight is loaded yet.

    QKV layers have that width from the start (`heads.qkv_parallel_linear_init`).
    """
    for name, module in model.named_modules():
        if _is_mla_attention(module):
            which, layer = _q_of_mla(module)
            _rebuild(layer, f"{name}.{which}", context)


def _rebuild(layer: Any, prefix: str, context: DcpContext) -> None:
    before = _form(layer)
    type(layer).__init__(
        layer,
        layer.input_size,
        layer.output_size,
        bias=layer.with_bias,
        skip_bias_add=layer.skip_bias_add,
        params_dtype=layer.params_dtype,
        quant_config=layer.quant_config,
        prefix=prefix,
        **attn_tp_partition(context),
    )
    if _form(layer) != before:
        raise RuntimeError(f"{prefix} became {_form(layer)}, and was {before}")


def _form(layer: Any) -> tuple[Any, ...]:
    """Return how a layer is quantized and where it is: the same at any width."""
    parameters = {n: (p.dtype, p.device) for n, p in layer.named_parameters()}
    scheme = type(getattr(layer, "scheme", None))
    return type(layer.quant_method), scheme, parameters


class QReplicas:
    """The replicated Q projections of a model, and the switch to and from all their heads.

    Making it is a collective over the DCP group.

    Parameters
    ----------
    model : nn.Module
        A loaded model. Its attention modules are found by their attributes.
    group
        DCP group. Its ranks are in `dcp_rank` order, which is head order.

    Raises
    ------
    DcpConfigError
        No attention module has a Q projection that can be replicated.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._group = group
        self._attentions = [
            found
            for module in model.modules()
            if (found := _replicate(module, group)) is not None
        ]
        if not self._attentions:
            raise DcpConfigError(
                f"--dcp-replicate-q-proj: {type(model).__name__} has no attention "
                "module whose Q projection can be replicated; drop the flag"
            )
        self._replicated = False
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather again what was gathered; a collective over the DCP group.

        Captured graphs stay valid: the tensors keep their addresses.
        """
        from sglang_dcp.distributed.groups import use_pynccl

        with use_pynccl(self._group):
            for attention in self._attentions:
                attention.refresh()

    def own_products(self) -> list[Product]:
        """Return this rank's share of each replicated product."""
        return [own for found in self._attentions for own in found.own_products()]

    def select(self, *, replicated: bool) -> None:
        """Choose the heads of the next forward: all in decode, the rank's own in extend.

        It returns at once if nothing changes.
        """
        if replicated == self._replicated:
            return
        self._replicated = replicated
        for attention in self._attentions:
            attention.select(replicated)


def _is_gqa_attention(module: Any) -> bool:
    return qkv_layer_of(module) is not None and hasattr(module, "q_size")


def _is_mla_attention(module: Any) -> bool:
    return hasattr(module, "w_kc") and hasattr(module, "forward_absorb_prepare")


def _q_of_mla(module: Any) -> tuple[str, Any]:
    name = "q_proj" if module.q_lora_rank is None else "q_b_proj"
    return name, getattr(module, name)


def _replicate(module: nn.Module, group: Any) -> Optional[_ReplicatedAttention]:
    if _is_gqa_attention(module):
        return _ReplicatedGqa(module, group)
    if _is_mla_attention(module):
        return _ReplicatedMla(module, group)
    return None


class _ReplicatedAttention(ABC):
    """One attention module that can project the Q heads of its DCP group."""

    @abstractmethod
    def own_products(self) -> list[Product]: ...

    @abstractmethod
    def refresh(self) -> None: ...

    @abstractmethod
    def select(self, replicated: bool) -> None: ...


class _ReplicatedLinearMethod:
    """Takes the place of a replicated layer's `quant_method`, which computes.

    Parameters
    ----------
    layer
        A linear layer of SGLang at attn_tp width.
    q_outputs : int
        Number of the rank's own Q outputs. Those of all ranks come first, in rank order.
    group
        DCP group.

    Attributes
    ----------
    replicated : bool
        Whether all outputs are computed. If not, they are the rank's own Q outputs, and
        what follows the Q outputs.

    Raises
    ------
    RuntimeError
        The layer has not that width.
    """

    def __init__(self, layer: Any, q_outputs: int, group: Any) -> None:
        ends = q_outputs * group.world_size
        own = slice(group.rank_in_group * q_outputs, None)
        outputs = layer.output_size_per_partition
        if outputs < ends or layer.skip_bias_add:
            raise RuntimeError(
                f"a Q projection of {outputs} outputs is not {ends} wide"
            )
        if own.start + q_outputs == ends:
            parts = [slice(own.start, outputs)]
        else:
            parts = [slice(own.start, own.start + q_outputs), slice(ends, outputs)]
        self._parts = [part for part in parts if part.start < part.stop]
        self._method: Any = layer.quant_method
        self.replicated = False

    def apply(
        self, layer: nn.Module, x: Any, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        if self.replicated:
            found: torch.Tensor = self._method.apply(layer, x, bias)
            return found
        return apply_rows(self._method, layer, self._parts, x, bias)

    def __getattr__(self, name: str) -> Any:
        # Other forms of `apply` would always compute all outputs.
        if name.startswith("apply"):
            raise AttributeError(f"a replicated Q projection has no {name}")
        return getattr(self._method, name)


def _own_product(layer: Any, q_outputs: int) -> Product:
    """Return the rank's own part of the Q product of a replicated layer, scales included."""
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    own = stored * q_outputs / layer.output_size_per_partition
    return Product(layer.input_size, q_outputs, own, layer.params_dtype)


class _ReplicatedGqa(_ReplicatedAttention):
    """GQA models: a fused QKV projection that the model splits by `q_size`."""

    def __init__(self, module: Any, group: Any) -> None:
        self._module = module
        self._times = group.world_size
        self._own = (module.q_size, module.num_heads)
        self._layer: Any = qkv_layer_of(module)
        self._method = _ReplicatedLinearMethod(self._layer, module.q_size, group)
        self._layer.quant_method = self._method

    def own_products(self) -> list[Product]:
        return [_own_product(self._layer, self._own[0])]

    def refresh(self) -> None:
        """Do nothing: SGLang's loaders fill all of the layer."""

    def select(self, replicated: bool) -> None:
        times = self._times if replicated else 1
        self._method.replicated = replicated
        self._module.q_size = self._own[0] * times
        self._module.num_heads = self._own[1] * times


class _ReplicatedMla(_ReplicatedAttention):
    """DeepSeek: all Q heads, and the absorbed K weights of all, while Q is prepared.

    The steps after it (exchange, `w_vc`, `o_proj`) work on the rank's local heads.
    """

    def __init__(self, module: Any, group: Any) -> None:
        self._module = module
        self._times = group.world_size
        self._local_heads = module.num_local_heads
        self._layer = _q_of_mla(module)[1]
        if getattr(self._layer, "use_intel_amx_backend", False):
            raise DcpConfigError(
                "--dcp-replicate-q-proj: Intel's AMX engine packs the K weights that "
                "decode absorbs, and they cannot be gathered; drop the flag"
            )
        self._q_outputs = self._layer.output_size_per_partition // group.world_size
        if self._q_outputs != self._local_heads * module.qk_head_dim:
            raise RuntimeError("a Q projection of DeepSeek has not attn_tp width")
        self._method = _ReplicatedLinearMethod(self._layer, self._q_outputs, group)
        self._layer.quant_method = self._method
        self._absorbed = AbsorbedK(module, self._layer.params_dtype, group)
        self._prepare = module.forward_absorb_prepare
        module.forward_absorb_prepare = self._prepare_replicated
        sglang_api().keep_quant_method_of_q_b(module)
        self._replicated = False

    def own_products(self) -> list[Product]:
        return [
            _own_product(self._layer, self._q_outputs),
            self._absorbed.own_product(self._layer.params_dtype),
        ]

    def refresh(self) -> None:
        self._absorbed.refresh()

    def select(self, replicated: bool) -> None:
        self._replicated = replicated

    def _prepare_replicated(self, *args: Any, **kwargs: Any) -> Any:
        if not self._replicated:
            return self._prepare(*args, **kwargs)
        self._method.replicated = True
        self._module.num_local_heads = self._local_heads * self._times
        try:
            with self._absorbed.of_all_ranks():
                return self._prepare(*args, **kwargs)
        finally:
            self._method.replicated = False
            self._module.num_local_heads = self._local_heads
