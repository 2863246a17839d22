"""What DCP attention refuses to compute, in one process and without communication.

Only this file catches a feature that the wrapper would drop in silence: cross
attention, logit capping or an argument meant for another backend.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.attention_oracle import FakePool, Served, Shape, SpyExchange
from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext
from sglang_dcp.distributed.topology import Layout

SHAPE = Shape(4, 2, 8, 8)


class Silent:
    """An exchange that must not be called."""


def make_backend(table: Any, pool: Any = None) -> Any:
    from sglang_dcp.layers.attention import DcpAttentionBackend
    from sglang_dcp.layers.backends.torch_native import TorchNativeBackend
    from sglang_dcp.layers.local_batch import LocalBatchBuilder

    views = LocalBatchBuilder(table, 2, 0, 1)
    backend = TorchNativeBackend(views.local_table, pool)
    context = DcpContext(DcpConfig(Layout(2, 1)), tp_rank=0)
    exchange: Any = SpyExchange(Silent())
    return DcpAttentionBackend(backend, views, exchange, context, None, pool)


def make_layer(**changes: Any) -> Any:
    fields = dict(
        layer_id=1,
        tp_q_head_num=2,
        qk_head_dim=8,
        v_head_dim=8,
        scaling=1.0,
        k_scale=None,
        is_cross_attention=False,
        logit_cap=0.0,
        sliding_window_size=-1,
        xai_temperature_len=-1,
        attn_type=SimpleNamespace(value="decoder"),
    )
    return SimpleNamespace(**{**fields, **changes})


def inputs(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, 16) for _ in range(3)]


@pytest.fixture
def ready() -> tuple[Any, Any]:
    """A backend with its metadata, and the batch: three new tokens, no prefix."""
    served = Served(1, 2)
    batch = served.batch("EXTEND", {"a": served.grow("a", 3)})
    backend = make_backend(served.table, FakePool(SHAPE, 2, 800, 1, torch.float32))
    backend.init_forward_metadata(batch)
    return backend, batch


@pytest.mark.parametrize("method", ["forward_decode", "forward_extend"])
@pytest.mark.parametrize(
    ("layer", "extra", "message"),
    [
        pytest.param({"is_cross_attention": True}, {}, "cross attention", id="cross"),
        pytest.param({"logit_cap": 30.0}, {}, "logit capping", id="logit-cap"),
        pytest.param({"sliding_window_size": 64}, {}, "windows", id="window"),
        pytest.param({"xai_temperature_len": 9}, {}, "not supported", id="xai"),
        pytest.param(
            {"attn_type": SimpleNamespace(value="encoder_only")},
            {},
            "encoder attention",
            id="encoder",
        ),
        pytest.param({}, {"sinks": torch.ones(2)}, r"\['sinks'\]", id="sinks"),
        pytest.param({}, {"is_neox": 1, "topk": 2}, r"\['is_neox', 'topk'\]", id="two"),
    ],
)
def test_refused_call_names_layer_and_argument(
    method: str, layer: Any, extra: Any, message: str, ready: Any
) -> None:
    backend, batch = ready
    with pytest.raises(NotImplementedError, match=f"layer 1.*{message}"):
        getattr(backend, method)(*inputs(3), make_layer(**layer), batch, **extra)


@pytest.mark.parametrize("method", ["forward_decode", "forward_extend"])
def test_shared_kv_is_refused(method: str, ready: Any) -> None:
    backend, batch = ready
    q = torch.randn(3, 16)
    with pytest.raises(NotImplementedError, match="shared K/V"):
        getattr(backend, method)(q, None, None, make_layer(), batch)


def test_argument_that_is_none_is_fine(ready: Any) -> None:
    backend, batch = ready
    out = backend.forward_extend(*inputs(3), make_layer(), batch, sinks=None)
    assert out.shape == (3, 16) and out.isfinite().all()


def test_forward_needs_metadata() -> None:
    served = Served(1, 2)
    batch = served.batch("EXTEND", {"a": served.grow("a", 3)})
    backend = make_backend(served.table)
    with pytest.raises(RuntimeError, match="init_forward_metadata"):
        backend.forward_extend(*inputs(3), make_layer(), batch)


def test_idle_batch_changes_nothing(ready: Any) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    backend, batch = ready
    idle = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    backend.init_forward_metadata(idle)
    # The exchange is `Silent`. A replica without requests may have rows of padding.
    for rows in (0, 4):
        out = backend.forward(*inputs(rows), make_layer(), idle)
        assert out.shape == (rows, 16)
    assert backend.forward_extend(*inputs(3), make_layer(), batch).isfinite().all()


def test_padding_of_a_prefill_belongs_to_no_request(ready: Any) -> None:
    """SGLang pads a batch to a multiple of the ranks of a replica, with any values."""
    backend, batch = ready
    rows = inputs(3)
    wanted = backend.forward_extend(*rows, make_layer(), batch)
    kept = backend.token_to_kv_pool.keys.clone()
    padding = torch.full((2, 16), float("nan"))
    batch.out_cache_loc = torch.nn.functional.pad(batch.out_cache_loc, (0, 2))
    backend.init_forward_metadata(batch)
    padded = [torch.cat([part, padding]) for part in rows]
    out = backend.forward_extend(*padded, make_layer(), batch)
    assert torch.equal(out[:3], wanted)
    assert torch.equal(out[3:], torch.zeros(2, 16))
    written = backend.token_to_kv_pool.keys
    assert torch.equal(written.nan_to_num(7.0), kept.nan_to_num(7.0))


def test_save_kv_cache_false_writes_nothing(ready: Any) -> None:
    backend, batch = ready
    pool = backend.token_to_kv_pool
    backend.forward_extend(*inputs(3), make_layer(), batch, False)
    assert pool.keys.isnan().all() and pool.values.isnan().all()
    backend.forward_extend(*inputs(3), make_layer(), batch)
    # Positions 0 and 2 of three are rank 0's.
    assert (~pool.keys[1].isnan().any(-1).any(-1)).sum() == 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
