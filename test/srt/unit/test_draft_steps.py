"""A draft's attention: one backend for each step, and what SGLang's workers get with DCP.

Only this file sees, without a GPU, that the steps of a captured draft do not share their
static tensors, and that all of them share one local table and one exchange.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext, clear_context, set_context
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import speculation
from sglang_dcp.layers import attention
from sglang_dcp.layers.draft_steps import DraftSteps
from sglang_dcp.layers.local_batch import LocalBatchBuilder
from sglang_dcp.layers.workspace import most_query_tokens, tokens_per_request
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support import speculation as refused

STEPS, REQUESTS, DCP, RANK = 4, 3, 2, 1
REQUESTS_IN_BUFFERS = 8
CONFIG = DcpConfig(Layout(DCP, 1))
ON, OFF = SimpleNamespace(dcp=CONFIG), SimpleNamespace(dcp=None)


class Inner:
    """An inner backend that keeps the local batches that it is given to plan."""

    is_lse_base_on_e = True
    head_tile = None

    def __init__(self, runner: Any) -> None:
        self.width = getattr(runner, "width", STEPS)
        self.table = runner.req_to_token_pool.req_to_token
        self.size = runner.req_to_token_pool.size
        self.planned: list[Any] = []
        self.sizes: tuple[int, int] = (0, 0)

    @classmethod
    def from_runner(cls, runner: Any) -> Inner:
        return cls(runner)

    def init_forward_metadata(self, batch: Any, local: Any) -> None:
        self.planned.append(local)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.sizes = (max_bs, max_num_tokens)

    def init_graph_metadata(self, local: Any, in_capture: bool) -> None:
        self.planned.append(local)


@pytest.fixture
def context() -> Iterator[DcpContext]:
    context = DcpContext(CONFIG, RANK)
    set_context(context)
    yield context
    clear_context()


@pytest.fixture
def runner(context: DcpContext, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The draft's runner, with the backend that SGLang's registry made for it."""
    monkeypatch.setattr(
        attention,
        "RunnerView",
        lambda runner, table, config, requests, width, head_tile: SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=table, size=requests),
            width=width,
        ),
    )
    monkeypatch.setattr(attention, "most_requests", lambda runner, config: REQUESTS)
    logical = torch.arange(REQUESTS * 32, dtype=torch.int32).view(REQUESTS, 32)
    batches = LocalBatchBuilder(logical, DCP, RANK, 1)
    runner = SimpleNamespace(
        server_args=ON, req_to_token_pool=None, token_to_kv_pool=None
    )
    view = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(
            req_to_token=batches.local_table, size=REQUESTS
        )
    )
    runner.attn_backend = attention.DcpAttentionBackend(
        Inner(view),  # type: ignore[arg-type]
        batches,
        object(),  # type: ignore[arg-type]
        context,
        None,
        None,
        width=STEPS,
    )
    runner.attn_backend.decode_attention_backend_str = "fa3"
    return runner


def draft_batch(lens: list[int]) -> Any:
    """SGLang's batch of all steps, of a table whose slots are its own positions."""
    rows = torch.arange(len(lens))
    slots = [row * 32 + n + i for row, n in enumerate(lens) for i in range(STEPS)]
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        req_pool_indices=rows,
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        seq_lens_sum=sum(lens),
        out_cache_loc=torch.tensor(slots),
        positions=torch.tensor(slots),
        spec_info=SimpleNamespace(),
    )


def counted(lens: list[int], step: int) -> list[int]:
    """How many of the positions up to a step's own this rank has."""
    return [sum(p % DCP == RANK for p in range(n + step + 1)) for n in lens]


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_every_step_keeps_its_own_plan(captured: bool, runner: Any) -> None:
    steps = DraftSteps.for_runner(runner, STEPS)
    assert len(steps.attn_backends) == STEPS - 1
    steps.init_cuda_graph_state(8, 8)
    for lens in ([5, 1, 8], [6, 2, 7]):
        if captured:
            steps.init_forward_metadata_out_graph(draft_batch(lens))
        else:
            steps.init_forward_metadata(draft_batch(lens))
        # Looked at when all are planned: the steps run after that.
        for step, backend in enumerate(steps.attn_backends):
            local = backend.backend.planned[-1]  # type: ignore[attr-defined]
            assert local.seq_lens.tolist() == counted(lens, step)
            assert local.seq_lens_cpu.tolist() == counted(lens, step)
            written = [
                (row * 32 + n + step) // DCP if (n + step) % DCP == RANK else 0
                for row, n in enumerate(lens)
            ]
            assert local.out_cache_loc.tolist() == written
            assert local.spec_info is None


def test_steps_share_table_and_exchange(runner: Any) -> None:
    base = runner.attn_backend
    for backend in DraftSteps.for_runner(runner, STEPS).attn_backends:
        assert backend is not base and backend.backend is not base.backend
        assert backend.exchange is base.exchange
        inner: Any = backend.backend
        # The steps have one token of each request.
        assert inner.width == 1
        assert inner.table is base.backend.table
        assert backend.decode_attention_backend_str == "fa3"


def test_captured_steps_have_room_for_one_token_of_each_request(runner: Any) -> None:
    steps = DraftSteps.for_runner(runner, STEPS)
    steps.init_cuda_graph_state(8, 8 * STEPS)
    sizes = {backend.backend.sizes for backend in steps.attn_backends}  # type: ignore[attr-defined]
    assert sizes == {(8, 8)}
    assert steps.get_cuda_graph_seq_len_fill_value() == 1


def test_a_captured_verification_is_one_query_of_each_request(runner: Any) -> None:
    """To the inner backend. The local batch has the slots of all query tokens."""
    runner.attn_backend.init_cuda_graph_state(8, 8 * STEPS)
    assert runner.attn_backend.backend.sizes == (8, 8)
    batch = draft_batch([5, 1])
    batch.forward_mode = ForwardMode.TARGET_VERIFY
    batch.spec_info = SimpleNamespace(num_tokens_per_req=STEPS)
    runner.attn_backend.init_forward_metadata_out_graph(batch)
    local = runner.attn_backend._local
    assert local.forward_batch.seq_lens.tolist() == [2, 0] and local.width == STEPS
    assert len(local.forward_batch.out_cache_loc) == 2 * STEPS
    assert local.empty_rows.tolist() == [False] * STEPS + [True] * STEPS


def extension_batch(lens: list[int], padded: int) -> Any:
    """What SGLang replays an extension with: its whole buffers, and the real slots alone."""
    batch = draft_batch([n + STEPS for n in lens])
    fill = [1 + STEPS] * (REQUESTS_IN_BUFFERS - len(lens))
    rows = [*range(len(lens)), *[0] * len(fill)]
    slots = [row * 32 + n + i for row, n in enumerate(lens) for i in range(STEPS)]
    del batch.positions
    return SimpleNamespace(
        **{
            **vars(batch),
            "forward_mode": ForwardMode.DRAFT_EXTEND_V2,
            "batch_size": padded,
            "req_pool_indices": torch.tensor(rows),
            "seq_lens": torch.tensor([n + STEPS for n in lens] + fill),
            "seq_lens_cpu": torch.tensor([n + STEPS for n in lens] + fill),
            "out_cache_loc": torch.tensor(slots),
            "spec_info": SimpleNamespace(num_tokens_per_req=STEPS),
        }
    )


@pytest.mark.parametrize("lens", [[5, 1, 8], [4], [7, 2]])
@pytest.mark.parametrize("padded", [3, 4])
def test_a_replayed_extension_reads_committed_tokens(
    lens: list[int], padded: int, runner: Any
) -> None:
    backend = runner.attn_backend
    backend.init_cuda_graph_state(REQUESTS_IN_BUFFERS, REQUESTS_IN_BUFFERS * STEPS)
    assert backend.get_cuda_graph_seq_len_fill_value() == 1 + STEPS
    backend.init_forward_metadata_out_graph(extension_batch(lens, padded))
    local, more = backend._local, padded - len(lens)
    committed = [*lens, *[1] * more]
    assert local.forward_batch.seq_lens.tolist() == counted(committed, -1)
    assert local.forward_batch.seq_lens_cpu.tolist() == counted(committed, -1)
    assert len(local.forward_batch.req_pool_indices) == padded
    assert len(local.forward_batch.positions) == padded
    written = [
        (row * 32 + n + i) // DCP if (n + i) % DCP == RANK else 0
        for row, n in enumerate(lens)
        for i in range(STEPS)
    ]
    assert local.forward_batch.out_cache_loc.tolist() == written + [0] * STEPS * more
    assert local.width == STEPS and len(local.empty_rows) == padded * STEPS


def test_a_forward_of_another_width_is_refused(runner: Any) -> None:
    """The inner backend has planned its kernels for one number of heads."""
    with pytest.raises(
        NotImplementedError, match="1 query tokens of each request, and"
    ):
        runner.attn_backend.init_forward_metadata(draft_batch([5]))


def test_an_exchange_has_room_for_all_rows(
    server_args: Any, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokens_per_request(server_args(tp_size=2, dcp_size=2)) == 1
    if not in_range(sglang_version(), "0.5.23", None):
        return
    monkeypatch.setattr(refused, "SERVED_ON_CPU", ("STANDALONE",))
    args = server_args(
        tp_size=2,
        dcp_size=2,
        speculative_algorithm="STANDALONE",
        speculative_draft_model_path=tiny_llama,
        speculative_eagle_topk=1,
        speculative_num_steps=4,
        speculative_num_draft_tokens=5,
    )
    assert tokens_per_request(args) == 5
    # SGLang drops the algorithm with some flags, and keeps the number.
    without = server_args(tp_size=2, dcp_size=2, speculative_num_draft_tokens=5)
    assert tokens_per_request(without) == 1
    # Three requests are padded to a multiple of two ranks.
    asked = SimpleNamespace(server_args=args, req_to_token_pool=SimpleNamespace(size=3))
    assert most_query_tokens(asked, CONFIG) == 20


def factory(args: Any, runner: Any, steps: int = STEPS) -> Any:
    runner.server_args = args
    return SimpleNamespace(draft_model_runner=runner, speculative_num_steps=steps)


def test_the_draft_gets_our_backends(runner: Any) -> None:
    def never(factory: Any) -> Any:
        raise AssertionError("SGLang's backend would read logical slots")

    made = speculation.create_draft_decode_backend(never, factory(ON, runner))
    assert isinstance(made, DraftSteps)
    one = factory(ON, runner, steps=1)
    assert speculation.create_draft_decode_backend(never, one) is None
    made = speculation.create_draft_extend_backend(never, one)
    # It also prefills for the draft model.
    assert made is runner.attn_backend


def test_without_dcp_the_draft_gets_sglangs_backends(runner: Any) -> None:
    made, asked = object(), factory(OFF, runner)
    hooks = (
        speculation.create_draft_decode_backend,
        speculation.create_draft_extend_backend,
    )
    for hook in hooks:
        assert hook(lambda factory: made, asked) is made


def test_extensions_are_captured_with_dcp(context: DcpContext) -> None:
    pytest.importorskip("sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner")
    from sglang.srt.speculative import eagle_draft_extend_cuda_graph_runner as sglang

    class Known:
        """A runner that SGLang chose."""

    def select(builtin_runner_cls: Any, oot_runner_cls: Any) -> Any:
        return builtin_runner_cls()

    def asked(known: Any) -> Any:
        return speculation.select_graph_runner(
            select, builtin_runner_cls=lambda: known, oot_runner_cls=lambda: None
        )

    assert asked(None) is sglang.EAGLEDraftExtendCudaGraphRunner
    assert asked(Known) is Known
    clear_context()
    assert asked(None) is None


class NgramWorker:
    """What our worker overrides of SGLang's."""

    def _prepare_draft_tokens(self, batch: Any) -> tuple[Any, Any]:
        width = 3
        mask = np.tile(np.eye(width, dtype=np.int64).flatten(), len(batch.reqs))
        return np.arange(len(batch.reqs) * width), mask


@pytest.mark.parametrize("args", [ON, OFF], ids=["dcp", "off"])
@pytest.mark.parametrize("ngram", [True, False], ids=["ngram", "other"])
def test_ngram_proposes_chains_with_dcp(args: Any, ngram: bool) -> None:
    algorithm = SimpleNamespace(is_ngram=lambda: ngram)
    found = speculation.create_worker(
        lambda algorithm, args: NgramWorker, algorithm, args
    )
    if args is OFF or not ngram:
        assert found is NgramWorker
        return
    assert issubclass(found, NgramWorker) and found is not NgramWorker
    drafts, mask = found()._prepare_draft_tokens(SimpleNamespace(reqs=[1, 2]))
    assert drafts.tolist() == [0, 1, 2, 3, 4, 5] and mask.dtype == np.int64
    assert mask.tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1] * 2


def test_accepted_kv_stays_where_it_is_with_dcp() -> None:
    moved: list[Any] = []
    speculation.move_accept_tokens(lambda *args: moved.append(args), "slots")
    assert moved == [("slots",)]
    set_context(DcpContext(CONFIG, RANK))
    try:
        speculation.move_accept_tokens(lambda *args: moved.append(args), "slots")
    finally:
        clear_context()
    assert moved == [("slots",)]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
