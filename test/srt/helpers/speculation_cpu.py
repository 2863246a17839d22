"""SGLang's kernels of speculative decoding in plain torch, for live servers on a CPU.

SGLang has them for GPUs, and for CPUs with its AMX engine. Each function here has the
name and the arguments of the one whose place it takes, and walks request by request.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, Optional

import torch
from torch import Tensor

_OPS = "sglang.kernels.ops.speculative"
# Function here: where SGLang defines the one that it replaces.
_PLACES = {
    "assign_extend_cache_locs_func": f"{_OPS}.cache_locs",
    "assign_draft_cache_locs_contiguous_func": f"{_OPS}.cache_locs",
    "fill_front_out_cache_loc_func": f"{_OPS}.cache_locs",
    "fill_accept_out_cache_loc_func": f"{_OPS}.eagle",
    "fill_bonus_tokens_func": f"{_OPS}.eagle",
    "build_tree_kernel_efficient_func": f"{_OPS}.spec_tree",
    "verify_tree_greedy_func": f"{_OPS}.spec_tree",
    "assign_req_to_token_pool_func": "sglang.srt.mem_cache.allocation",
    "copy_all_layer_kv_cache_func": "sglang.kernels.ops.kvcache.cache_move",
}


def install() -> None:
    """Put the functions in place, from a plugin's `load`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for name, module in _PLACES.items():
        HookRegistry.register(f"{module}.{name}", globals()[name], HookType.REPLACE)
    # This module imports a CUDA library, so it has to be replaced as a whole.
    whole = ModuleType(f"{_OPS}.reconstruct_tree")
    setattr(whole, reconstruct.__name__, reconstruct)
    setattr(whole, "reconstruct_indices_from_tree_mask_func", reconstruct)
    sys.modules[whole.__name__] = whole


def copy_all_layer_kv_cache_func(
    data_ptrs: Tensor,
    strides: Tensor,
    tgt_loc: Tensor,
    src_loc: Tensor,
    num_locs: int,
    num_locs_upper: int,
    kv_copy_config: dict[str, int],
) -> None:
    """A pool warms it up on slot 0. With DCP nothing may be moved by logical slots."""
    assert not tgt_loc.any() and not src_loc.any(), "K/V would be moved"


def assign_req_to_token_pool_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    counts = (end_offset - start_offset).tolist()
    ranges = zip(req_pool_indices.tolist(), start_offset.tolist(), counts)
    for (row, start, count), slots in zip(ranges, out_cache_loc.split(counts)):
        req_to_token[row, start : start + count] = slots.to(req_to_token.dtype)


def assign_extend_cache_locs_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist())
    return torch.cat([req_to_token[r, a:b] for r, a, b in rows]).to(torch.int64)


def assign_draft_cache_locs_contiguous_func(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Optional[Tensor] = None,
    mrope: Optional[Tensor] = None,
) -> None:
    assert positions is None and mrope is None
    width = topk * num_cols
    rows = zip(req_pool_indices.tolist(), seq_lens.tolist())
    slots = [req_to_token[row, start : start + width] for row, start in rows]
    out_cache_loc.copy_(torch.cat(slots))


def fill_front_out_cache_loc_func(
    num_front: Tensor, out_cache_loc: Tensor, front_out_cache_loc: Tensor
) -> None:
    window = out_cache_loc.view(len(num_front), -1)
    front = torch.cat([row[:n] for row, n in zip(window, num_front.tolist())])
    front_out_cache_loc[: len(front)] = front


def fill_accept_out_cache_loc_func(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor, size: int
) -> None:
    accepted = accept_index.flatten()
    slots = out_cache_loc[accepted[accepted >= 0].long()]
    accept_out_cache_loc[: len(slots)] = slots


def fill_bonus_tokens_func(
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    last = accept_tokens.view(batch_size, accept_stride).gather(
        1, accept_lens.long()[:, None] - 1
    )
    bonus_tokens.copy_(last.flatten())


def build_tree_kernel_efficient_func(
    parent_list: Tensor,
    top_scores_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: int = 0,
) -> None:
    """A chain only. No DCP backend reads the mask."""
    assert topk == 1
    requests, width = retrieve_index.shape
    order = torch.arange(width)
    positions.copy_((seq_lens[:, None] + order).flatten())
    retrieve_index.copy_(torch.arange(requests * width).view(requests, width))
    retrieve_next_token.copy_(torch.where(order < width - 1, order + 1, -1))
    retrieve_next_sibling.fill_(-1)


def reconstruct(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Links of any tree: entry (i, j) of a mask says that j is an ancestor of i."""
    width = draft_token_num
    masks = tree_mask.view(batch_size, width, width).bool().tolist()
    retrieve_index.copy_(torch.arange(batch_size * width).view(batch_size, width))
    nodes = range(width)
    for request, mask in enumerate(masks):
        parents = [max((j for j in range(i) if mask[i][j]), default=-1) for i in nodes]
        for node in nodes:
            depth = sum(mask[node][:node])
            at = int(verified_seq_len[request]) + depth
            positions[request * width + node] = at
            children = [i for i in nodes if parents[i] == node]
            siblings = [i for i in nodes if i > node and parents[i] == parents[node]]
            retrieve_next_token[request, node] = min(children, default=-1)
            rooted = parents[node] >= 0
            retrieve_next_sibling[request, node] = (
                min(siblings, default=-1) if rooted else -1
            )


def verify_tree_greedy_func(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the root on, take the child that holds what the target predicts."""
    wanted = target_predict.flatten().tolist()
    for request in range(len(candidates)):
        node, accepted = 0, [int(retrieve_index[request, 0])]
        while len(accepted) < accept_index.shape[1]:
            child = int(retrieve_next_token[request, node])
            while (
                child >= 0 and int(candidates[request, child]) != wanted[accepted[-1]]
            ):
                child = int(retrieve_next_sibling[request, child])
            if child < 0:
                break
            node = child
            accepted.append(int(retrieve_index[request, node]))
        accept_index[request, : len(accepted)] = torch.tensor(accepted)
        accept_token_num[request] = len(accepted) - 1
        for index in accepted:
            predicts[index] = wanted[index]
    return predicts, accept_index, accept_token_num
