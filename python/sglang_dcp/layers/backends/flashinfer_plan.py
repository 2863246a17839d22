"""Plans of FlashInfer's kernels for latents, all from host lengths, and how much one holds."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Optional

import torch

from sglang_dcp.layers.backends.flashinfer import indptr

# Rows (query tokens x heads) of one tile of a thread-block cluster.
_TILE, _SMALL_TILE = 128, 64
# Of a plan, by its buffers (`MLAPlan` in FlashInfer's `scheduler.cuh`). FlashInfer 0.6 does
# not check it. Keys of at most one tile a cluster are split beyond the tiles.
_MAX_WORK, _SPLITS = 16384, 256
# Kernels multiply the number of a token, and of a head, by its stride in 32 bits.
_MAX_OFFSET = 1 << 32


def heads_at_once(queries: Sequence[int], heads: int) -> int:
    """Most heads, dividing `heads`, whose tiles fit into one plan.

    Raises
    ------
    ValueError
        For more tokens than fit with one head.
    """
    for parts in range(1, heads + 1):
        if heads % parts == 0 and _work(queries, heads // parts) <= _MAX_WORK:
            return heads // parts
    raise ValueError(f"{sum(queries)} tokens do not fit into a FlashInfer MLA plan")


def check_decode_rows(rows: int, heads: int) -> None:
    """Raise RuntimeError for more rows of a decode step than fit into one plan."""
    tile = _SMALL_TILE if heads <= _SMALL_TILE else _TILE
    if rows * -(-heads // tile) + _SPLITS > _MAX_WORK:
        raise RuntimeError(
            f"{rows} rows of {heads} heads do not fit into a FlashInfer MLA plan: use a "
            "smaller --max-running-requests or --speculative-num-draft-tokens"
        )


def _work(queries: Sequence[int], heads: int) -> int:
    small = sum(queries) * heads // len(queries) <= _SMALL_TILE
    tile = _SMALL_TILE if small else _TILE
    return sum(-(-length * heads // tile) for length in queries) + _SPLITS


def check_int32_strides(queries: torch.Tensor) -> None:
    """RuntimeError for queries [tokens, heads, dim] that kernels would read elsewhere."""
    spans = zip(queries.shape[:2], queries.stride())
    if any(count * stride >= _MAX_OFFSET for count, stride in spans):
        raise RuntimeError(
            f"queries {tuple(queries.shape)} with strides {queries.stride()} are more than "
            "FlashInfer's MLA kernels address: use a smaller --chunked-prefill-size"
        )


class Sizes(NamedTuple):
    """What a plan is made of beside lengths."""

    heads: int  # of the attn_tp shard
    latent_dim: int
    rope_dim: int
    scaling: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    device: torch.device

    def of_plan(
        self, heads: int, page_size: int, kv_dtype: torch.dtype, *, causal: bool
    ) -> dict[str, Any]:
        """Name them as FlashInfer does."""
        return dict(
            num_heads=heads,
            head_dim_ckv=self.latent_dim,
            head_dim_kpe=self.rope_dim,
            page_size=page_size,
            causal=causal,
            sm_scale=self.scaling,
            q_data_type=self.dtype,
            kv_data_type=kv_dtype,
        )


class LatentWrapper:
    """FlashInfer's `BatchMLAPagedAttentionWrapper`; LSE in base 2.

    `run` reads the plan made last. So does a captured graph, which keeps the addresses of
    the plan and of the list of pages. So every plan must lie where the first one lay.
    Here, with FlashInfer 0.6, it does: in a buffer of the wrapper.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def plan(self, where: dict[str, torch.Tensor], sizes: dict[str, Any]) -> None:
        """Plan for lengths and pages `where`, and `Sizes.of_plan`.

        All plans of one wrapper have the same sizes, but for the number of heads.
        """
        self._wrapper.plan(**where, **sizes)

    def run(
        self,
        q: tuple[torch.Tensor, torch.Tensor],
        keys: tuple[torch.Tensor, torch.Tensor],
        **scales: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and LSE. `q` and `keys` are latent and rotary part."""
        return self._wrapper.run(*q, *keys, return_lse=True, **scales)


class ContractWrapper(LatentWrapper):
    """The same where plans say what `run` returns: FlashInfer 0.7.

    There, `wrapper.plan` makes other buffers each time, and wants each request's pages
    right behind those of the one before. So it runs once, for one key. What it leaves
    behind makes all plans, in its own buffers and from pages at any place.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._planner: Optional[Any] = None

    def plan(self, where: dict[str, torch.Tensor], sizes: dict[str, Any]) -> None:
        if self._planner is None:
            self._planner = self._first_plan(sizes)
        quantized = sizes["kv_data_type"].itemsize == 1
        self._planner.plan(
            **where,
            **sizes,
            output_dtype=sizes["q_data_type"],
            scale_mode="kv-per-tensor" if quantized else "default",
            use_profiler=False,
        )

    def run(
        self,
        q: tuple[torch.Tensor, torch.Tensor],
        keys: tuple[torch.Tensor, torch.Tensor],
        **scales: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._wrapper.run(query=q, kv_cache=keys, return_lse=True, **scales)

    def _first_plan(self, sizes: dict[str, Any]) -> Any:
        from flashinfer.mla import MLAPlanMetadata

        one = indptr([1])
        where = paged(one, one, torch.zeros(1, dtype=torch.int32), one.diff())
        self._wrapper.plan(
            metadata=MLAPlanMetadata.csr(**where),
            **sizes,
            query_layout="split",
            kv_cache_layout="split",
            lse_mode="base2",
        )
        return self._wrapper._planned_backend


def latent_wrapper(wrapper: Any) -> LatentWrapper:
    """Choose by what its `plan` takes. Nothing else asks which FlashInfer it is."""
    has_contract = "lse_mode" in inspect.signature(wrapper.plan).parameters
    return (ContractWrapper if has_contract else LatentWrapper)(wrapper)


def paged(
    ends: torch.Tensor, starts: torch.Tensor, pages: torch.Tensor, lens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Name lengths and pages as FlashInfer does; int32, on the host but for `pages`."""
    return dict(qo_indptr=ends, kv_indptr=starts, kv_indices=pages, kv_len_arr=lens)


def plan_pages(
    wrapper: LatentWrapper,
    sizes: Sizes,
    heads: int,
    queries: Iterable[int],
    lens: torch.Tensor,
    pages: torch.Tensor,
) -> None:
    """Keys in pages of the pool, not causal.

    `lens` [requests] on the host; `pages` [requests or more, width] int32: a request's
    first page is at its row, which the kernel takes for an offset into all of them.
    """
    starts = torch.arange(len(lens) + 1, dtype=torch.int32) * pages.shape[1]
    where = paged(indptr(queries), starts, pages.view(-1), lens.to(torch.int32))
    of_plan = sizes.of_plan(heads, sizes.page_size, sizes.kv_dtype, causal=False)
    wrapper.plan(where, of_plan)


def plan_rows(
    wrapper: LatentWrapper, sizes: Sizes, heads: int, queries: Iterable[int]
) -> None:
    """Keys in the model's dtype, one a query, as pages of one; causal."""
    ends = indptr(queries)
    rows = torch.arange(int(ends[-1]), dtype=torch.int32, device=sizes.device)
    of_plan = sizes.of_plan(heads, 1, sizes.dtype, causal=True)
    wrapper.plan(paged(ends, ends, rows, ends.diff()), of_plan)


def plan_mha(
    wrapper: Any,
    queries: Iterable[int],
    keys: Iterable[int],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    causal: bool,
) -> None:
    """K and V of every query head; `sizes` is heads, qk_dim and v_dim."""
    heads, qk_dim, v_dim = sizes
    wrapper.plan(
        indptr(queries),
        indptr(keys),
        heads,
        heads,
        qk_dim,
        head_dim_vo=v_dim,
        causal=causal,
        q_data_type=dtype,
    )


def sizes_of(runner: Any) -> Sizes:
    """What SGLang's FlashInfer backend reads of the runner for its plans."""
    from sglang.srt.runtime_context import get_parallel

    model = runner.model_config
    return Sizes(
        model.num_attention_heads // get_parallel().attn_tp_size,
        model.kv_lora_rank,
        model.qk_rope_head_dim,
        model.scaling,
        runner.dtype,
        runner.kv_cache_dtype,
        runner.page_size,
        runner.req_to_token_pool.req_to_token.device,
    )
