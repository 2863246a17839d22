"""`--dcp-replicate-q-proj`: the Q projection at attn_tp width, so decode gathers no Q.

In decode every rank of a KVP group projects the queries of the whole head shard (Helix,
arXiv 2507.07120, 2.1.1). In extend each projects its own heads, as without the flag.
The narrow weights stay where SGLang loads and updates them; the wide ones are gathered
from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Callable, Optional

import torch
from torch import nn

from sglang_dcp.config import DcpConfigError


def after_load_model(result: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Seam: `ModelRunner.load_model`; widens the Q projections that it loaded."""
    from sglang_dcp.context import find_context
    from sglang_dcp.distributed.groups import get_kvp_group

    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        runner.dcp_q_replicas = QReplicas(runner.model, get_kvp_group())
    return result


def around_weight_update(
    original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any
) -> Any:
    """Seam: every `WeightUpdater.update_weights_from_*`; refreshes the wide weights.

    Also after a failed update: all ranks must take part in the gather.
    """
    from sglang_dcp.context import find_context

    result = original(updater, *args, **kwargs)
    context = find_context()
    if context is not None and context.config.replicate_q_proj:
        updater.get_model_runner().dcp_q_replicas.refresh()
    return result


class QReplicas:
    """The wide Q projections of a model and the switch between widths.

    Parameters
    ----------
    model : nn.Module
        Loaded; its attention modules are found by what they hold.
    group
        KVP group; weights are gathered in `kvp_rank` order, which is head order.

    Raises
    ------
    DcpConfigError
        For a model in which no attention module with a Q projection is found.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        self._group = group
        self._attentions = [
            wide
            for module in model.modules()
            if (wide := _widen(module, group)) is not None
        ]
        if not self._attentions:
            raise DcpConfigError(
                f"--dcp-replicate-q-proj: {type(model).__name__} has no attention "
                "module whose Q projection can be replicated; drop the flag"
            )
        self._wide = False
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather the wide weights anew; a collective over the KVP group."""
        from sglang_dcp.distributed.groups import by_captured_communicator

        with by_captured_communicator(self._group):
            for attention in self._attentions:
                attention.refresh()

    def select(self, *, wide: bool) -> None:
        """Choose the width of the next forward: wide in decode. Free where it stays."""
        if wide == self._wide:
            return
        self._wide = wide
        for attention in self._attentions:
            attention.select(wide)


def _widen(module: nn.Module, group: Any) -> Optional[_WideAttention]:
    from sglang.srt.layers.linear import QKVParallelLinear

    if isinstance(getattr(module, "qkv_proj", None), QKVParallelLinear):
        return _WideGqa(module, group)
    if hasattr(module, "w_kc") and hasattr(module, "forward_absorb_prepare"):
        return _WideMla(module, group)
    return None


class _WideAttention(ABC):
    """One attention module that can be switched to the Q heads of its KVP group."""

    def __init__(self, module: Any, group: Any) -> None:
        self._module = module
        self._group = group

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Rows of all ranks of the group, in rank order."""
        return self._group.all_gather(own.contiguous(), dim=0)

    @abstractmethod
    def refresh(self) -> None: ...

    @abstractmethod
    def select(self, wide: bool) -> None: ...


def _renew(old: Optional[torch.Tensor], new: torch.Tensor) -> torch.Tensor:
    """`new` where `old` was: captured graphs hold its address."""
    return new if old is None else old.copy_(new)


class _WideLinearMethod:
    """Stands in a linear layer's `quant_method`: the wide weight while switched on.

    Raises
    ------
    DcpConfigError
        For a method other than a plain product: a checkpoint or an environment variable
        may quantize single layers of a model that names no quantization.
    """

    def __init__(self, narrow: Any) -> None:
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

        if not isinstance(narrow, UnquantizedLinearMethod):
            raise DcpConfigError(
                f"--dcp-replicate-q-proj: a Q projection is computed by "
                f"{type(narrow).__name__}, and only a plain one can be held at attn_tp "
                "width; drop the flag"
            )
        self._narrow = narrow
        self.wide = False
        self.weight: Optional[torch.Tensor] = None
        self.bias: Optional[torch.Tensor] = None

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        if not self.wide:
            return self._narrow.apply(layer, x, bias)
        assert self.weight is not None
        return nn.functional.linear(x, self.weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._narrow, name)


class _WideGqa(_WideAttention):
    """Llama and its kin: a fused QKV projection split by `q_size`."""

    def __init__(self, module: Any, group: Any) -> None:
        super().__init__(module, group)
        self._own = (module.q_size, module.num_heads)
        self._method = _WideLinearMethod(module.qkv_proj.quant_method)
        module.qkv_proj.quant_method = self._method

    def refresh(self) -> None:
        layer, method = self._module.qkv_proj, self._method
        method.weight = _renew(method.weight, self._widen_rows(layer.weight))
        if getattr(layer, "bias", None) is not None:
            method.bias = _renew(method.bias, self._widen_rows(layer.bias))

    def _widen_rows(self, own: torch.Tensor) -> torch.Tensor:
        q_size = self._own[0]
        return torch.cat([self._gather(own[:q_size]), own[q_size:]])

    def select(self, wide: bool) -> None:
        times = self._group.world_size if wide else 1
        self._method.wide = wide
        self._module.q_size = self._own[0] * times
        self._module.num_heads = self._own[1] * times


class _WideMla(_WideAttention):
    """DeepSeek: Q projection and absorbed K weight wide while Q is prepared.

    What follows (the exchange, `w_vc`, `o_proj`) works on the rank's own heads again.
    """

    def __init__(self, module: Any, group: Any) -> None:
        super().__init__(module, group)
        self._own_heads = module.num_local_heads
        self._layer = module.q_proj if module.q_lora_rank is None else module.q_b_proj
        self._method = _WideLinearMethod(self._layer.quant_method)
        self._layer.quant_method = self._method
        self._prepare = module.forward_absorb_prepare
        module.forward_absorb_prepare = self._prepare_wide
        # That kernel reads the layer's own weight, past its quant_method.
        module.use_min_latency_q_b_gemm = False
        self._wide = False
        self._w_kc: Optional[torch.Tensor] = None

    def refresh(self) -> None:
        method = self._method
        method.weight = _renew(method.weight, self._gather(self._layer.weight))
        self._w_kc = _renew(self._w_kc, self._gather(self._module.w_kc))

    def select(self, wide: bool) -> None:
        self._wide = wide

    def _prepare_wide(self, *args: Any, **kwargs: Any) -> Any:
        if not self._wide:
            return self._prepare(*args, **kwargs)
        module, own_w_kc = self._module, self._module.w_kc
        self._method.wide = True
        module.num_local_heads = self._own_heads * self._group.world_size
        module.w_kc = self._w_kc
        try:
            return self._prepare(*args, **kwargs)
        finally:
            self._method.wide = False
            module.num_local_heads = self._own_heads
            module.w_kc = own_w_kc
