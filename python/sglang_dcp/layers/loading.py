"""Weights that a model cuts by K/V heads on its own, outside of its QKV layer.

Such code sees `kv_heads * dcp_size` heads, as everything does (see `heads`). A checkpoint
has `kv_heads` of them. Two things close the gap, whatever the model:

- While weights load, the model config tells the true count. Some models split a fused
  tensor of the checkpoint by it.
- Norms over all K heads get a weight with each rank's heads repeated, in rank order, as if
  the checkpoint had that many heads.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import nn

from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.heads import (
    is_mla,
    kv_head_counts,
    qkv_layer_of,
    repeat_heads,
)

_COUNT = "num_key_value_heads"
EXPORT_ERROR = (
    "with DCP a rank's attention weights are cut in another way than plain TP cuts them, "
    "and no server loads them so; use the checkpoint"
)


class KvHeads(NamedTuple):
    """The K/V heads of one attention module.

    Attributes
    ----------
    layout : Layout
    total : int
        Number of heads in the checkpoint.
    dim : int
        Numbers of one K head.
    """

    layout: Layout
    total: int
    dim: int

    @property
    def local(self) -> int:
        return self.layout.kv_heads_per_rank(self.total)

    @property
    def seen(self) -> int:
        """Number of heads that SGLang's code sees."""
        return self.total * self.layout.dcp_size

    def expand(self, full: torch.Tensor) -> torch.Tensor:
        """Repeat the heads of each rank for all ranks of its DCP group.

        Parameters
        ----------
        full : torch.Tensor
            [heads * dim] or [heads, dim], with the heads of the checkpoint.

        Returns
        -------
        The same with `seen` heads. SGLang's cut for a rank, at `seen` heads and `tp_size`
        ranks, then gives the heads that the rank holds.
        """
        shards = self.total // self.local
        return repeat_heads(full, shards, self.layout.dcp_size)


def norms_over_heads(module: nn.Module, dim: int) -> list[nn.Parameter]:
    """Return the weights of norms right below `module` that differ from head to head.

    They have not the size `dim` of one head, or the model cuts them for each rank.
    """
    return [
        parameter
        for name, child in module.named_children()
        if "norm" in name
        for parameter in child.parameters(recurse=False)
        if parameter.numel() != dim or hasattr(parameter, "weight_loader")
    ]


def prepare_loading(model: nn.Module, model_config: Any, layout: Layout) -> None:
    """Make `model`, built but not loaded, load its K/V heads for `layout`.

    `model_config` is SGLang's `ModelConfig` with scaled K/V heads. It holds for later
    weight updates too. MLA has no K/V heads to cut.
    """
    if is_mla(model_config):
        return
    total = kv_head_counts(model_config)[0]
    for module in model.modules():
        for attention in attentions_of(module):
            heads = KvHeads(layout, total, attention.qk_head_dim)
            for parameter in norms_over_heads(module, heads.dim):
                _expand_for(parameter, heads)
    _load_with_true_count(model, model_config)


def refuse_export(model: nn.Module, model_config: Any, *, replicated_q: bool) -> None:
    """Let SGLang refuse to send, save or show the weights of `model` where DCP cut them.

    MLA without a replicated Q projection holds the weights of plain TP. SGLang asks for the
    attribute as of 0.5.23.
    """
    if replicated_q or not is_mla(model_config):
        setattr(model, "_weight_export_error", EXPORT_ERROR)


def attentions_of(module: nn.Module) -> list[Any]:
    """Return SGLang's attention layers right below `module`, if it has a QKV layer."""
    from sglang.srt.layers.radix_attention import RadixAttention

    if qkv_layer_of(module) is None:
        return []
    below = list(module.children())
    below += [m for child in below if isinstance(child, nn.ModuleList) for m in child]
    return [child for child in below if isinstance(child, RadixAttention)]


def _expand_for(parameter: Any, heads: KvHeads) -> None:
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    # Only a model that cuts the weight for each rank has a loader for it.
    own = getattr(parameter, "weight_loader", None)
    size = heads.seen if own is None else heads.local
    if parameter.numel() == size * heads.dim:
        parameter.weight_loader = _expanding(own or default_weight_loader, heads)


def _expanding(load: Callable[..., None], heads: KvHeads) -> Callable[..., None]:
    def load_expanded(
        parameter: nn.Parameter, full: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        of_k = full.numel() == heads.total * heads.dim
        load(parameter, heads.expand(full) if of_k else full, *args, **kwargs)

    return load_expanded


def _load_with_true_count(model: Any, model_config: Any) -> None:
    load = model.load_weights

    def load_weights(*args: Any, **kwargs: Any) -> Any:
        with _true_count(model_config):
            return load(*args, **kwargs)

    model.load_weights = load_weights


@contextmanager
def _true_count(model_config: Any) -> Iterator[None]:
    total, seen = kv_head_counts(model_config)
    holders = (model_config.hf_config, model_config.hf_text_config)
    counted = [holder for holder in holders if hasattr(holder, _COUNT)]
    for holder in counted:
        setattr(holder, _COUNT, total)
    try:
        yield
    finally:
        for holder in counted:
            setattr(holder, _COUNT, seen)
