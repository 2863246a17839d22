"""Which way DeepSeek's attention is computed, and who writes and reads its latents.

Only this file sees that without DCP all three are SGLang's own, and the measure by which,
with DCP, a prefill is MHA.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.config import DcpConfig
from sglang_dcp.context import DcpContext
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.layers.mla import dispatch, groups
from sglang_dcp.layers.mla.cost import MlaSizes
from sglang_dcp.layers.mla.form import PrefillForm
from sglang_dcp.layers.mla.prefill import MlaPrefill

ENTRIES = {
    "fa3": dispatch.mla_forward_method_fa3,
    "flashinfer": dispatch.mla_forward_method_flashinfer,
}
DCP_SIZE = 2
# DeepSeek-V2-Lite, of one of two ranks.
LITE = MlaSizes(8, DCP_SIZE, 512, 64, 128, 128)


@pytest.fixture
def dcp(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """DCP on; the batches that were prepared for expanded prefixes."""
    context = DcpContext(DcpConfig(Layout(DCP_SIZE, 1)), tp_rank=0)
    monkeypatch.setattr(dispatch, "find_context", lambda: context)
    prepared: list[Any] = []

    def prepare(batch: Any, form: PrefillForm) -> None:
        if form in (PrefillForm.ONE_SHOT, PrefillForm.PREFIX_CHUNKS):
            prepared.append(batch)

    def prepare_groups(batch: Any, module: Any, share_out: Any) -> None:
        prepared.append((batch.extend_prefix_lens_cpu, module, share_out().stays))

    prefill = SimpleNamespace(
        form=lambda choose: choose(),
        prepare=prepare,
        prepare_groups=prepare_groups,
        sizes=LITE,
    )
    backend = SimpleNamespace(prefill=prefill)
    monkeypatch.setattr(dispatch, "_backend", lambda: backend)
    return prepared


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_context", lambda: None)


def attention(**flags: Any) -> Any:
    """SGLang's attention module."""
    known = dict(
        disable_chunked_prefix_cache=False, flashinfer_mla_disable_ragged=False
    )
    return SimpleNamespace(**{**known, **flags})


def chosen(
    name: str,
    module: Any,
    mode: str,
    prefix: list[int],
    new: list[int],
    capacity: int = 400,
) -> str:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = SimpleNamespace(
        forward_mode=ForwardMode[mode],
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens_cpu=new,
        get_max_chunk_capacity=lambda: capacity,
    )
    return str(ENTRIES[name](module, batch).name)


@pytest.mark.parametrize("name", ENTRIES)
def test_without_dcp_sglang_chooses(
    name: str, off: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    answer = object()
    asked: list[Any] = []

    def choose(*args: Any) -> Any:
        asked.append(args)
        return answer

    monkeypatch.setattr(handlers, f"handle_attention_{name}", choose)
    module, batch = attention(), object()
    assert ENTRIES[name](module, batch) is answer
    assert asked == [(module, batch)]


@pytest.mark.parametrize("name", ENTRIES)
def test_decode_is_absorbed(name: str, dcp: list[Any]) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE)
    assert ENTRIES[name](attention(), batch).name == "MLA"


@pytest.mark.parametrize("mode", ["EXTEND", "MIXED"])
@pytest.mark.parametrize("name", ENTRIES)
def test_prefill_is_mha_unless_its_prefix_stays_in_place(
    name: str, mode: str, dcp: list[Any]
) -> None:
    """By time: short turns stay on long prefixes, and one long chunk expands them all."""
    module = attention()
    assert chosen(name, module, mode, [0, 0], [5, 1]) == "MHA_CHUNKED_KV"
    assert chosen(name, module, mode, [1 << 18, 1 << 17], [60, 4]) == "MLA"
    assert not dcp
    assert chosen(name, module, mode, [200, 92], [9, 1]) == "MHA_ONE_SHOT"
    assert chosen(name, module, mode, [200, 202], [19, 1]) == "MHA_CHUNKED_KV"
    long = [1 << 18, 0], [8000, 4], 1 << 17
    assert chosen(name, module, mode, *long) == "MHA_CHUNKED_KV"
    prepared = [batch.extend_prefix_lens_cpu for batch in dcp]
    assert prepared == [[200, 92], [200, 202], [1 << 18, 0]]


def weights(**changes: Any) -> dict[str, Any]:
    """What tells how SGLang absorbs: as it loads weights in 16 bit."""
    plain = torch.zeros(8, 2, 3, dtype=torch.bfloat16)
    known = dict(w_kc=plain, w_vc=plain, use_deep_gemm_bmm=False)
    return {**known, "kv_b_proj": SimpleNamespace(), **changes}


# A long chunk on a long prefix, and short turns on longer ones.
TWO_KINDS = [1 << 15, *[1 << 18] * 8], [8192, *[100] * 8], 1 << 17


@pytest.mark.parametrize("name", ENTRIES)
def test_two_kinds_of_requests_take_two_forms_where_that_is_served(
    name: str, dcp: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = attention(**weights())
    one_form = chosen(name, module, "EXTEND", *TWO_KINDS)
    assert dcp == [] and one_form == "MLA"
    monkeypatch.setattr(groups, "SERVED", frozenset({name}))
    assert chosen(name, module, "MIXED", *TWO_KINDS) == "MHA_CHUNKED_KV"
    [(prefix, asked, stays)] = dcp
    assert (prefix, asked) == (TWO_KINDS[0], module)
    assert stays == [False, *[True] * 8]
    absorbed = attention(**weights(), disable_chunked_prefix_cache=True)
    assert chosen(name, absorbed, "EXTEND", *TWO_KINDS) == "MLA"


@pytest.mark.parametrize(
    "changes",
    [
        {"w_kc": torch.zeros(8, 2, 3).to(torch.float8_e4m3fn)},
        {"w_vc": torch.zeros(8, 2, 3).to(torch.float8_e4m3fn)},
        {"w_kc": None},
        {"w_vc": torch.zeros(8, 2, 3, dtype=torch.int32)},
        {"use_deep_gemm_bmm": True},
        {"kv_b_proj": SimpleNamespace(set_lora=True)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_weights_that_need_other_products_take_one_form(
    changes: dict[str, Any], dcp: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "SERVED", frozenset({"fa3"}))
    module = attention(**weights(**changes))
    assert chosen("fa3", module, "EXTEND", *TWO_KINDS) == "MLA"
    assert not dcp


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("nope, v", [(128, 192), (192, 128), (32, 64)])
def test_heads_that_kernels_were_not_checked_for_stay_absorbed(
    nope: int, v: int, name: str, dcp: list[Any]
) -> None:
    backend: Any = dispatch._backend()
    backend.prefill.sizes = LITE._replace(nope=nope, v=v)
    assert chosen(name, attention(), "EXTEND", [0], [5]) == "MLA"


@pytest.mark.parametrize("name", ENTRIES)
def test_flags_that_forbid_expanding(name: str, dcp: list[Any]) -> None:
    without_chunks = attention(disable_chunked_prefix_cache=True)
    assert chosen(name, without_chunks, "EXTEND", [0], [5]) == "MHA_CHUNKED_KV"
    assert chosen(name, without_chunks, "EXTEND", [5], [5]) == "MLA"
    absorbed = attention(flashinfer_mla_disable_ragged=True)
    mine = {"fa3": "MHA_CHUNKED_KV", "flashinfer": "MLA"}[name]
    assert chosen(name, absorbed, "EXTEND", [0], [5]) == mine


def test_latents_without_dcp_are_sglangs_own(off: None) -> None:
    called: list[Any] = []
    args = "module", "latents", "latent", "rope", "batch"
    dispatch.set_mla_kv_buffer(lambda *got: called.append(got), *args)  # type: ignore
    assert called == [args]
    asked = "module", "slots", torch.bfloat16, "batch"
    found = dispatch.get_mla_kv_buffer(lambda *got: got, *asked)  # type: ignore
    assert found == asked


def test_latents_with_dcp_go_to_the_backend(
    dcp: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    backend = SimpleNamespace(
        write_latents=lambda layer, latent, rope: called.append(
            (layer, tuple(latent.shape), rope)
        ),
        prefill=SimpleNamespace(latents=lambda *got: got),
    )
    monkeypatch.setattr(dispatch, "_backend", lambda: backend)

    def never(*args: Any) -> None:
        raise AssertionError("by logical slots")

    module: Any = SimpleNamespace(attn_mha="layer")
    latent: Any = torch.zeros(3, 5)
    dispatch.set_mla_kv_buffer(never, module, None, latent, "rope", None)  # type: ignore
    assert called == [("layer", (3, 1, 5), "rope")]
    found = dispatch.get_mla_kv_buffer(never, module, latent, torch.float16, "batch")
    assert found == ("layer", torch.float16, "batch")


@pytest.mark.parametrize("verb", ["set", "get"])
def test_deepseek_has_the_methods_from_where_they_are_hooked(verb: str) -> None:
    from sglang.srt.models.deepseek_common.attention_forward_methods import forward_mha
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    name = f"_{verb}_mla_kv_buffer"
    own = getattr(DeepseekV2AttentionMLA, name)
    assert own is getattr(forward_mha.DeepseekMHAForwardMixin, name)


def test_the_entries_are_those_that_sglang_registers() -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    for name in ENTRIES:
        assert callable(getattr(handlers, f"handle_attention_{name}"))
        assert name in handlers.AttentionBackendRegistry._handlers


def test_the_first_layer_of_each_forward_chooses_for_all() -> None:
    nothing: Any = None
    prefill = MlaPrefill(*[nothing] * 5)
    wanted = iter((PrefillForm.ABSORBED, PrefillForm.ONE_SHOT))
    forms = []
    for _ in range(2):
        prefill.init_forward_metadata(nothing)
        forms += [prefill.form(lambda: next(wanted)) for _ in range(3)]
    assert forms == [PrefillForm.ABSORBED] * 3 + [PrefillForm.ONE_SHOT] * 3


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
