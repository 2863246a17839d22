"""`--dcp-replicate-q-proj`: the Q projection at attn_tp width, so decode gathers no Q.

In decode each rank projects the queries of its whole DCP group. In extend it projects its
local heads, as without the flag. The sharded weights stay where SGLang loads and updates
them. The replicated weights are gathered from them.

Source: Helix, arXiv 2507.07120, section 2.1.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Callable, Optional

import torch
from torch import nn

from sglang_dcp.config import DcpConfigError
from sglang_dcp.releases.api import sglang_api


def after_load_model(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook: `ModelRunner.load_model`; replicates the loaded Q projections."""
    from sglang_dcp.context import find_context
    from sglang_dcp.distributed.groups import get_dcp_group

    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        runner.dcp_q_replicas = QReplicas(runner.model, get_dcp_group())
    return result


def around_weight_update(
    original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook: every `WeightUpdater.update_weights_from_*`; refreshes the replicated weights.

    It does so after a failed update too, because all ranks must take part in the gather.
    """
    from sglang_dcp.context import find_context

    result = original(updater, *args, **kwargs)
    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        updater.get_model_runner().dcp_q_replicas.refresh()
    return result


class QReplicas:
    """The replicated Q projections of a model, and the switch to and from them.

    Making it is a collective over the DCP group.

    Parameters
    ----------
    model : nn.Module
        A loaded model. Its attention modules are found by their attributes.
    group
        DCP group. Weights are gathered in `dcp_rank` order, which is head order.

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
        """Gather the replicated weights again; a collective over the DCP group.

        Captured graphs stay valid: the weights keep their addresses.
        """
        from sglang_dcp.distributed.groups import use_pynccl

        with use_pynccl(self._group):
            for attention in self._attentions:
                attention.refresh()

    def own_weights(self) -> list[torch.Tensor]:
        """Return this rank's share of each replicated weight: [out, in] or [h, in, out]."""
        return [own for found in self._attentions for own in found.own_weights()]

    def select(self, *, replicated: bool) -> None:
        """Choose the weights of the next forward: replicated in decode, sharded in extend.

        It returns at once if nothing changes.
        """
        if replicated == self._replicated:
            return
        self._replicated = replicated
        for attention in self._attentions:
            attention.select(replicated)


def _replicate(module: nn.Module, group: Any) -> Optional[_ReplicatedAttention]:
    from sglang.srt.layers.linear import QKVParallelLinear

    if isinstance(getattr(module, "qkv_proj", None), QKVParallelLinear):
        return _ReplicatedGqa(module, group)
    if hasattr(module, "w_kc") and hasattr(module, "forward_absorb_prepare"):
        return _ReplicatedMla(module, group)
    return None


class _ReplicatedAttention(ABC):
    """One attention module that can project the Q heads of its DCP group."""

    def __init__(self, module: Any, group: Any) -> None:
        self._module = module
        self._group = group

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Gather the rows of all ranks of the group, in rank order."""
        return self._group.all_gather(own.contiguous(), dim=0)

    @abstractmethod
    def own_weights(self) -> list[torch.Tensor]: ...

    @abstractmethod
    def refresh(self) -> None: ...

    @abstractmethod
    def select(self, replicated: bool) -> None: ...


def _renew(old: Optional[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """Copy `new` into `old`, if there is one: captured graphs hold its address."""
    return new if old is None else old.copy_(new)


class _ReplicatedLinearMethod:
    """Takes the place of a linear layer's `quant_method`.

    While `replicated` is true, it computes with the replicated weight.

    Raises
    ------
    DcpConfigError
        The layer is quantized, or its weight is packed for Intel's AMX engine. A
        checkpoint or an environment variable may quantize single layers of a model that
        names no quantization.
    """

    def __init__(self, layer: nn.Module) -> None:
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        sharded = layer.quant_method
        packed = getattr(layer, "use_intel_amx_backend", False)
        if packed or not isinstance(sharded, UnquantizedLinearMethod):
            kind = "Intel's AMX engine" if packed else type(sharded).__name__
            raise DcpConfigError(
                f"--dcp-replicate-q-proj: a Q projection is computed by {kind}, and only "
                "an unquantized one can be held at attn_tp width; drop the flag"
            )
        self._sharded: Any = sharded
        self.replicated = False
        self.weight: Optional[torch.Tensor] = None
        self.bias: Optional[torch.Tensor] = None

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        if not self.replicated:
            return self._sharded.apply(layer, x, bias)
        assert self.weight is not None
        return nn.functional.linear(x, self.weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        # Other forms of `apply` would compute with the sharded weight.
        if name.startswith("apply"):
            raise AttributeError(f"a replicated Q projection has no {name}")
        return getattr(self._sharded, name)


class _ReplicatedGqa(_ReplicatedAttention):
    """GQA models: a fused QKV projection that the model splits by `q_size`."""

    def __init__(self, module: Any, group: Any) -> None:
        super().__init__(module, group)
        self._own = (module.q_size, module.num_heads)
        self._method = _ReplicatedLinearMethod(module.qkv_proj)
        module.qkv_proj.quant_method = self._method

    def own_weights(self) -> list[torch.Tensor]:
        return [self._module.qkv_proj.weight[: self._own[0]]]

    def refresh(self) -> None:
        layer, method = self._module.qkv_proj, self._method
        method.weight = _renew(method.weight, self._replicate_rows(layer.weight))
        if getattr(layer, "bias", None) is not None:
            method.bias = _renew(method.bias, self._replicate_rows(layer.bias))

    def _replicate_rows(self, own: torch.Tensor) -> torch.Tensor:
        q_size = self._own[0]
        return torch.cat([self._gather(own[:q_size]), own[q_size:]])

    def select(self, replicated: bool) -> None:
        times = self._group.world_size if replicated else 1
        self._method.replicated = replicated
        self._module.q_size = self._own[0] * times
        self._module.num_heads = self._own[1] * times


class _ReplicatedMla(_ReplicatedAttention):
    """DeepSeek: Q projection and absorbed K weight are replicated while Q is prepared.

    The steps after it (exchange, `w_vc`, `o_proj`) work on the rank's local heads.
    """

    def __init__(self, module: Any, group: Any) -> None:
        super().__init__(module, group)
        self._local_heads = module.num_local_heads
        self._layer = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        self._method = _ReplicatedLinearMethod(self._layer)
        self._layer.quant_method = self._method
        self._prepare = module.forward_absorb_prepare
        module.forward_absorb_prepare = self._prepare_replicated
        sglang_api().keep_quant_method_of_q_b(module)
        self._replicated = False
        self._w_kc: Optional[torch.Tensor] = None

    def own_weights(self) -> list[torch.Tensor]:
        return [self._layer.weight, self._module.w_kc]

    def refresh(self) -> None:
        method = self._method
        method.weight = _renew(method.weight, self._gather(self._layer.weight))
        self._w_kc = _renew(self._w_kc, self._gather(self._module.w_kc))

    def select(self, replicated: bool) -> None:
        self._replicated = replicated

    def _prepare_replicated(self, *args: Any, **kwargs: Any) -> Any:
        if not self._replicated:
            return self._prepare(*args, **kwargs)
        module, own_w_kc = self._module, self._module.w_kc
        self._method.replicated = True
        module.num_local_heads = self._local_heads * self._group.world_size
        module.w_kc = self._w_kc
        try:
            return self._prepare(*args, **kwargs)
        finally:
            self._method.replicated = False
            module.num_local_heads = self._local_heads
            module.w_kc = own_w_kc
