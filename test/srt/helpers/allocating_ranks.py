"""One rank at work with kernels that only allocate, and the sizes by which that is told.

What `test_forward_memory.py` and `test_decode_memory.py` share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from helpers import backend_groups
from helpers.attention_oracle import Step
from helpers.backend_ranks import Case, Rank, sglang_context
from helpers.kernels_that_allocate import (
    AllocatingFa3,
    AllocatingFlashInfer,
    SilentGroup,
    allocating_kernels,
)
from helpers.live_bytes import LiveBytes
from helpers.parallel import attention_width
from sglang_dcp.distributed.exchange import create_exchange
from sglang_dcp.layers.backends.base import InnerBackend
from sglang_dcp.layers.backends.fa3 import Fa3Backend
from sglang_dcp.layers.backends.fa3_mla import Fa3MlaBackend
from sglang_dcp.layers.backends.flashinfer import FlashInferBackend
from sglang_dcp.layers.backends.flashinfer_mla import FlashInferMlaBackend
from sglang_dcp.layers.backends.triton import TritonBackend
from sglang_dcp.layers.forward_sizes import ForwardSizes
from sglang_dcp.ops.layout import most_kept_kv_heads


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def sizes_of(case: Case, comm_backend: str, inner: InnerBackend) -> ForwardSizes:
    shape = case.shape
    heads = shape.q_heads // case.dcp_size
    return ForwardSizes(
        case.backend,
        heads,
        case.dcp_size,
        shape.kv_heads,
        most_kept_kv_heads(heads, shape.kv_heads, case.dcp_size),
        shape.qk_dim,
        shape.v_dim,
        case.dtype.itemsize,
        (case.kv_dtype or case.dtype).itemsize,
        latent=shape.latent,
        gathers_lse=comm_backend == "ag_rs",
        planned_outputs=inner.planned_outputs,
        width=case.width,
        head_tile=inner.head_tile,
    )


def allocating_backend(case: Case, runner: Any) -> InnerBackend:
    """Triton's is SGLang's own, whose kernels do not run."""
    latent = case.shape.latent
    if case.backend == "triton":
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        return TritonBackend(TritonAttnBackend(runner))
    if case.backend == "fa3":
        return (Fa3MlaBackend if latent else Fa3Backend)(AllocatingFa3(runner))
    wrappers = [AllocatingFlashInfer() for _ in range(3)]
    if latent:
        return FlashInferMlaBackend(runner, wrappers, AllocatingFlashInfer)
    inner = SimpleNamespace(
        forward_metadata=SimpleNamespace(decode_wrappers=wrappers[:1]),
        init_forward_metadata=lambda local: None,
        prefill_wrappers_paged=wrappers[1:],
        token_to_kv_pool=runner.token_to_kv_pool,
    )
    return FlashInferBackend(inner, AllocatingFlashInfer)


class Served:
    """One rank that serves requests, with kernels that only allocate.

    With a `replicated` Q a decode step brings the queries of all ranks.
    """

    def __init__(
        self, case: Case, comm_backend: str, *, replicated: bool = False
    ) -> None:
        self.group = backend_groups.Group(case, allocating_backend)
        self.rank: Rank = self.group.ranks[0]
        self._replicated = replicated
        silent: Any = SilentGroup(case.dcp_size)
        exchange = create_exchange(comm_backend, silent)
        backend = self.rank.backend
        backend.exchange = backend.decode._exchange = exchange

    @property
    def inner(self) -> Any:
        """SGLang's backend, or what stands for it."""
        return self.rank.backend.backend._inner  # type: ignore[attr-defined]

    def peak(self, step: Step) -> int:
        """Serve a forward; returns the most bytes that its attention allocated."""
        new, batch = self.group.batch(step)
        q, k, v = self.group.inputs(new)
        if not self._replicated:
            q = q[:, self.rank.own]
        rows, more = self._as_a_model(q, k, v)
        backend, layer = self.rank.backend, self.rank.layer
        backend.init_forward_metadata(batch)
        with LiveBytes() as live:
            backend.forward(*rows, layer, batch, **more)
        return live.peak

    def _as_a_model(self, *rows: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        """Queries, keys and values are cut from one product, or MLA's come in two parts."""
        q, k, v = rows
        if self.group.case.shape.latent:
            at = self.group.case.shape.v_dim
            # The absorbed part is what a batched product over heads leaves.
            latent = q[..., :at].transpose(0, 1).clone().transpose(0, 1)
            keys = k[..., :at].clone()
            more = dict(q_rope=q[..., at:].clone(), k_rope=k[..., at:].clone())
            return (latent, keys, keys), more
        product = torch.cat([part.flatten(1) for part in rows], 1)
        parts = product.split([part.flatten(1).shape[1] for part in rows], 1)
        return [part.unflatten(1, row.shape[1:]) for part, row in zip(parts, rows)], {}


@contextmanager
def serving(
    case: Case, comm_backend: str = "a2a", *, replicated: bool = False
) -> Iterator[tuple[Served, ForwardSizes]]:
    """A rank of `case`, and its sizes."""
    with (
        sglang_context("cpu", **case.arguments),
        attention_width(case.dcp_size),
        allocating_kernels(),
    ):
        served = Served(case, comm_backend, replicated=replicated)
        sizes = sizes_of(case, comm_backend, served.rank.backend.backend)
        yield served, sizes._replace(replicated_q=replicated)


def without_splits(served: Served, sizes: ForwardSizes) -> ForwardSizes:
    """As in deterministic inference, so that splits of FA3 hide nothing else."""
    if sizes.backend == "fa3":
        served.inner.num_splits = 1
    return sizes._replace(splits=False)
