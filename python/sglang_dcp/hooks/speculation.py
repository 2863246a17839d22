"""Hooks of speculative decoding: the draft's attention, and drafts that are chains."""

from __future__ import annotations

import functools
from typing import Any, Callable, Optional

from sglang_dcp.config import dcp_of


def create_draft_decode_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Hook: `DraftBackendFactory.create_decode_backend`; steps over the sharded pool."""
    runner = factory.draft_model_runner
    if dcp_of(runner.server_args) is None:
        return original(factory)
    from sglang_dcp.layers.draft_steps import DraftSteps

    steps = factory.speculative_num_steps
    # As SGLang: one step needs no attention of its own.
    return DraftSteps.for_runner(runner, steps) if steps > 1 else None


def create_draft_extend_backend(original: Callable[[Any], Any], factory: Any) -> Any:
    """Hook: `DraftBackendFactory.create_draft_extend_backend`; the draft runner's own.

    It prefills, too, and a replayed extension has tensors of its own. Verifications belong to
    the target's runner.
    """
    runner = factory.draft_model_runner
    if dcp_of(runner.server_args) is None:
        return original(factory)
    return runner.attn_backend


def select_graph_runner(
    original: Callable[..., Optional[type]], **choices: Callable[[], Optional[type]]
) -> Optional[type]:
    """Hook: `eagle_worker_v2._select_spec_graph_runner_cls`; extensions are captured.

    SGLang leaves the extension of a draft uncaptured for a class of backends that it does
    not know.
    """
    from sglang_dcp.context import find_context

    found = original(**choices)
    if found is not None or find_context() is None:
        return found
    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as sglang

    return sglang.EAGLEDraftExtendCudaGraphRunner  # type: ignore[no-any-return]


def create_worker(
    original: Callable[[Any, Any], Any], algorithm: Any, server_args: Any
) -> Any:
    """Hook: `SpeculativeAlgorithm.create_worker`; NGRAM proposes chains with DCP on."""
    worker = original(algorithm, server_args)
    if dcp_of(server_args) is None or not algorithm.is_ngram():
        return worker
    return _chain_ngram_worker(worker)


def move_accept_tokens(
    original: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    """Hook: `move_accept_tokens_to_target_kvcache`; does nothing with DCP on.

    SGLang moves K/V of the accepted tokens to the first slots of a verification, by
    logical slots. The accepted tokens of a chain are there already.
    """
    from sglang_dcp.context import find_context

    if find_context() is None:
        original(*args, **kwargs)


@functools.cache
def _chain_ngram_worker(worker: type[Any]) -> type[Any]:
    """Derive from SGLang's `NGRAMWorker` a worker whose drafts are chains.

    Its corpus fills a short match up with nodes that are children of the root. Verified
    behind the match instead, they are guesses as good as any.
    """
    from sglang_dcp.ops.query_rows import chain_mask

    class ChainNgramWorker(worker):  # type: ignore[misc]
        def _prepare_draft_tokens(self, batch: Any) -> tuple[Any, Any]:
            drafts, mask = super()._prepare_draft_tokens(batch)
            requests = len(batch.reqs)
            chain = chain_mask(requests, len(drafts) // requests)
            return drafts, chain.numpy().astype(mask.dtype).reshape(mask.shape)

    return ChainNgramWorker
