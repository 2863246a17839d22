"""Hooks for machines without a GPU, where SGLang's CPU path expects its AMX engine.

They are active only if torch sees no accelerator. Each hook acts only where SGLang would
stop, and changes nothing that works without it.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Callable, Optional

import torch
from torch.overrides import TorchFunctionMode

from sglang_dcp.releases.api import sglang_api

IS_CPU = True
_BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def init_threads_binding(**sizes: int) -> None:
    """Hook: `init_threads_binding`; sets a core list for every rank.

    SGLang gives each rank a NUMA node, and stops if there are more ranks than nodes.
    """
    from sglang.srt.utils.numa_utils import get_cpu_ids_by_node

    ranks = sglang_api().binding_ranks(sizes)
    if _BIND in os.environ or ranks <= len(get_cpu_ids_by_node()):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.environ[_BIND] = "|".join(cores_of_rank(cores, r, ranks) for r in range(ranks))


def cores_of_rank(cores: list[int], rank: int, ranks: int) -> str:
    """List the cores of one rank, comma separated.

    The cores are split evenly. If there are fewer cores than ranks, ranks share them.
    """
    if len(cores) < ranks:
        return str(cores[rank % len(cores)])
    lo, hi = rank * len(cores) // ranks, (rank + 1) * len(cores) // ranks
    return ",".join(str(core) for core in cores[lo:hi])


def pynccl_init(
    original: Callable[..., None],
    self: Any,
    group: Any,
    device: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Hook: `PyNcclCommunicator.__init__`; disabled on CPU ranks, without NCCL."""
    import torch.distributed as dist

    if torch.device(device).type != "cpu":
        original(self, group, device, *args, **kwargs)
        return
    self.rank = dist.get_rank(group)
    self.world_size = dist.get_world_size(group)
    self.group = group
    self.available = False
    self.disabled = True


def get_rope_wrapper(
    original: Callable[..., Any],
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Hook: `get_rope_wrapper`; unscaled rotary embeddings on CPU take SGLang's default."""
    fixed = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling)
    if kwargs.get("device") == "cpu" and rope_scaling is None:
        kwargs["device"] = None
    return original(*fixed, *args, **kwargs)


def adjust_config_with_unaligned_cpu_tp(
    original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Hook: `adjust_config_with_unaligned_cpu_tp`; no padded heads.

    Only SGLang's AMX engine can load them, so they stay if it is in use.
    """
    from sglang.srt.utils.common import is_cpu

    return original(model_config, *args, **kwargs) if is_cpu() else model_config


def apply_vocab_mask(
    original: Callable[..., None],
    self: Any,
    logits: torch.Tensor,
    vocab_mask: torch.Tensor,
) -> None:
    """Hook: `XGrammarGrammar.apply_vocab_mask`; `backend_vocab_mask` for one grammar."""
    backend_vocab_mask(partial(original, self), logits, vocab_mask)


def backend_vocab_mask(
    original: Callable[..., None], logits: torch.Tensor, vocab_mask: torch.Tensor
) -> None:
    """Hook: `XGrammarGrammarBackend.apply_vocab_mask`; on CPU by XGrammar's own kernel.

    Parameters
    ----------
    original : callable
        SGLang's function, which raises for logits on a CPU.
    logits : torch.Tensor
        [requests, vocabulary], 16 bit or float32. Excluded tokens become -inf in place.
    vocab_mask : torch.Tensor
        [requests, ceil(vocabulary / 32)] int32. A set bit allows its token.
    """
    if logits.device.type != "cpu":
        original(logits, vocab_mask)
        return
    from xgrammar import apply_token_bitmask_inplace

    apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


class _Unpinned(TorchFunctionMode):
    """While entered, tensors that ask for pinned memory get plain memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def without_pinned_memory(
    original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Hook: methods that pin memory; torch pins only for an accelerator."""
    with _Unpinned():
        return original(*args, **kwargs)


def all_gather_into_tensor(
    original: Callable[..., None],
    group: Any,
    output: torch.Tensor,
    input: torch.Tensor,
) -> None:
    """Hook: `GroupCoordinator.all_gather_into_tensor`; on CPU the method of its custom op.

    gloo takes the rows of all ranks one after the other, and not in a dimension of ranks.
    """
    if input.device.type == "cpu":
        group._all_gather_into_tensor(output.view(-1, *input.shape[1:]), input)
    else:
        original(group, output, input)


def reduce_scatter_tensor(
    original: Callable[..., None],
    group: Any,
    output: torch.Tensor,
    input: torch.Tensor,
) -> None:
    """Hook: `GroupCoordinator.reduce_scatter_tensor`; on CPU the method of its custom op."""
    if input.device.type == "cpu":
        group._reduce_scatter_tensor(output, input)
    else:
        original(group, output, input)


def padding_length(original: Callable[..., int], backend: Any) -> int:
    """Hook: `AttentionBackend.get_cuda_graph_seq_len_fill_value`; one token.

    It is for backends without a length of their own, where SGLang raises. The dummy slot
    of the KV pool is that token.
    """
    return 1


def copy_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    dim: int,
    offset: torch.Tensor,
    sz: torch.Tensor,
    offset_src: bool,
) -> None:
    """Take the place of SGLang's `memcpy_triton`: copy the rows of one replica.

    Parameters
    ----------
    dst, src : torch.Tensor
        [rows, ...], with equal shapes behind the first dimension.
    dim : int
        Always 0, as in SGLang's kernel.
    offset, sz : torch.Tensor
        First row and number of rows, one number each. A tensor may have fewer rows.
    offset_src : bool
        Whether `offset` is a row of `src`, and not of `dst`.
    """
    if dim != 0:
        raise ValueError(f"rows are copied along dimension 0, not {dim}")
    first, rows = int(offset), int(sz)
    if offset_src:
        rows = min(rows, len(dst), len(src) - first)
        dst[:rows] = src[first : first + rows]
    else:
        rows = min(rows, len(src), len(dst) - first)
        dst[first : first + rows] = src[:rows]


class _TorchKernel:
    """Takes the place of a Triton kernel: `kernel[grid](...)` calls a torch function."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def _alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

    pages = -(-seq_lens // page_size) - -(-prefix_lens // page_size)
    if int(pages.sum()) > len(free_pages):
        return  # the caller counts pages next and reports that memory ran out
    alloc_extend_naive(
        prefix_lens,
        seq_lens,
        last_loc,
        free_pages,
        out_indices,
        page_size,
        out_indices.device,
    )


def _alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out_indices: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    starts_page = (seq_lens - 1) % page_size == 0
    needed = int(starts_page.sum())
    if needed > len(free_pages):
        return
    out_indices.copy_(last_loc + 1)
    out_indices[starts_page] = free_pages[:needed] * page_size


ALLOC_EXTEND = _TorchKernel(_alloc_extend)
ALLOC_DECODE = _TorchKernel(_alloc_decode)
