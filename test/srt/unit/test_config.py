"""What the four flags mean: sizes that imply each other, and SGLang's `ServerArgs`.

Only this file catches a flag that is parsed but lost on the way (command line, Engine,
pickle to a scheduler, `/server_info`), and a default that changes without DCP.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from helpers.gloo_ranks import run_python
from helpers.server_args import as_server_info, resolve_server_args
from sglang_dcp.config import DcpConfig, DcpConfigError, Replicas, resolve_config
from sglang_dcp.distributed.topology import Layout
from sglang_dcp.hooks import verify
from sglang_dcp.hooks.server_args import post_capture_kv_sizing_planned
from sglang_dcp.releases.api import sglang_api
from sglang_dcp.releases.installed import in_range, sglang_version
from sglang_dcp.support.server import default_comm_backend


def resolve(tp: int, dcp: int | None, attn_tp: int | None, **more: Any) -> Any:
    return resolve_config(tp_size=tp, dcp_size=dcp, attn_tp_size=attn_tp, **more)


@pytest.mark.parametrize(
    ("tp", "dcp", "attn_tp", "wanted"),
    [
        pytest.param(8, 4, None, (4, 2), id="dcp-implies-attn-tp"),
        pytest.param(8, None, 2, (4, 2), id="attn-tp-implies-dcp"),
        pytest.param(8, 4, 2, (4, 2), id="both-agree"),
        pytest.param(6, 3, None, (3, 2), id="three"),
        pytest.param(4, None, 1, (4, 1), id="attn-tp-1"),
        pytest.param(4, 4, None, (4, 1), id="all-ranks"),
        pytest.param(8, None, None, None, id="no-flag"),
        pytest.param(8, 1, None, None, id="dcp-1"),
        pytest.param(8, None, 8, None, id="attn-tp-is-tp"),
        pytest.param(8, 1, 8, None, id="both-off"),
        pytest.param(1, 1, 1, None, id="tp-1"),
    ],
)
def test_sizes(
    tp: int, dcp: int | None, attn_tp: int | None, wanted: tuple[int, int] | None
) -> None:
    config = resolve(tp, dcp, attn_tp)
    if wanted is None:
        assert config is None
        return
    assert (config.dcp_size, config.attn_tp_size) == wanted
    assert config.tp_size == tp and config.layout == Layout(tp, wanted[1])
    assert (config.comm_backend, config.replicate_q_proj) == ("ag_rs", False)


@pytest.mark.parametrize(
    ("tp", "count", "dcp", "attn_tp", "wanted"),
    [
        pytest.param(8, 2, 2, None, Layout(4, 2, 2), id="dcp"),
        pytest.param(8, 2, None, 1, Layout(4, 1, 2), id="attn-tp"),
        pytest.param(8, 4, 2, 1, Layout(2, 1, 4), id="both"),
        pytest.param(8, 8, 1, None, None, id="a-rank-each"),
        pytest.param(8, 2, None, None, None, id="no-flag"),
    ],
)
def test_sizes_of_a_replica(
    tp: int, count: int, dcp: int | None, attn_tp: int | None, wanted: Layout | None
) -> None:
    config = resolve(tp, dcp, attn_tp, replicas=Replicas(count))
    assert (config and config.layout) == wanted


# 0.5.16 has the first one, and DCP refuses it there.
DP_SPELLINGS: list[dict[str, Any]] = []
if in_range(sglang_version(), "0.5.23", None):
    DP_SPELLINGS = [{"enable_dp_attention": True, "dp_size": 2}, {"attn_dp_size": 2}]


@pytest.mark.parametrize("dp", DP_SPELLINGS, ids=lambda dp: "-".join(dp))
def test_dp_attention_in_each_of_its_spellings(
    dp: dict[str, Any], server_args: Any, tiny_qwen3: str
) -> None:
    flags = {"tp_size": 4, "dcp_size": 2, "page_size": 4, **dp}
    args = server_args(model_path=tiny_qwen3, chunked_prefill_size=102, **flags)
    assert args.dcp == DcpConfig(Layout(2, 1, 2), page_size=4)
    resolved = sglang_api().resolved(args)
    assert sglang_api().attention_replicas(resolved)[0] == 2
    # SGLang gives each replica its part of 102 tokens, in whole logical pages.
    assert (resolved.page_size, resolved.chunked_prefill_size) == (8, 48)
    shown = as_server_info(args)
    assert (shown["dcp_size"], shown["attn_tp_size"]) == (2, 1)


@pytest.mark.parametrize("dp", DP_SPELLINGS, ids=lambda dp: "-".join(dp))
def test_dp_attention_with_too_few_ranks(dp: dict[str, Any], server_args: Any) -> None:
    flag = "--attn-dp-size" if "attn_dp_size" in dp else "--dp-size"
    message = f"--dcp-size 4 does not divide the 2 ranks .*--tp-size 4 / {flag} 2"
    with pytest.raises(DcpConfigError, match=message):
        server_args(tp_size=4, dcp_size=4, **dp)


@pytest.mark.parametrize("comm_backend", ["ag_rs", "a2a"])
@pytest.mark.parametrize("replicate", [False, True], ids=["gather", "replicate"])
def test_every_combination_of_backend_and_replication(
    comm_backend: str, replicate: bool
) -> None:
    config = resolve(4, 2, None, comm_backend=comm_backend, replicate_q_proj=replicate)
    assert config == DcpConfig(Layout(4, 2), comm_backend, replicate)


@pytest.mark.parametrize(
    ("sizes", "more", "parts"),
    [
        pytest.param((8, 3, None), {}, ["--dcp-size 3", "8", "1, 2, 4, 8"], id="dcp-3"),
        pytest.param((8, 0, None), {}, ["--dcp-size 0", "1, 2, 4, 8"], id="dcp-0"),
        pytest.param((8, -2, None), {}, ["--dcp-size -2"], id="dcp-negative"),
        pytest.param((4, 8, None), {}, ["--dcp-size 8", "--tp-size 4"], id="dcp-8"),
        pytest.param((6, None, 4), {}, ["--attn-tp-size 4", "1, 2, 3, 6"], id="attn-4"),
        pytest.param(
            (8, 4, 4),
            {},
            ["--attn-tp-size 4", "--dcp-size 4", "--tp-size 8", "give one of the two"],
            id="disagree",
        ),
        pytest.param((0, 1, None), {}, ["--tp-size 0", "at least 1"], id="no-ranks"),
        pytest.param(
            (8, 4, None),
            {"replicas": Replicas(4, "--attn-dp-size")},
            [
                "--dcp-size 4 does not divide the 2 ranks of a replica",
                "(--tp-size 8 / --attn-dp-size 4)",
                "use one of [1, 2], or --attn-dp-size of [1, 2]",
            ],
            id="dcp-over-replicas",
        ),
        pytest.param(
            (8, None, 8),
            {"replicas": Replicas(2)},
            ["--attn-tp-size 8", "the 4 ranks of a replica", "--dp-size of [1]"],
            id="attn-tp-over-replicas",
        ),
        pytest.param(
            (8, 4, 2),
            {"replicas": Replicas(2)},
            ["--attn-tp-size 2 and --dcp-size 4 disagree", "4 ranks of a replica"],
            id="disagree-in-a-replica",
        ),
        pytest.param(
            (8, 2, None),
            {"replicas": Replicas(3)},
            ["--dp-size 3 does not divide --tp-size 8", "use one of [1, 2, 4, 8]"],
            id="ragged-replicas",
        ),
        pytest.param(
            (4, None, None),
            {"comm_backend": "a2a"},
            ["--dcp-comm-backend a2a", "needs --dcp-size > 1", "drop the flag"],
            id="backend-without-dcp",
        ),
        pytest.param(
            (4, 1, 4),
            {"replicate_q_proj": True},
            ["--dcp-replicate-q-proj", "needs --dcp-size > 1", "drop the flag"],
            id="replication-without-dcp",
        ),
    ],
)
def test_refusal_names_flag_value_and_hint(
    sizes: tuple[int, int | None, int | None], more: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(DcpConfigError) as caught:
        resolve(*sizes, **more)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("given", [None, "ag_rs"])
def test_the_default_backend_counts_only_where_none_is_given(given: str | None) -> None:
    config = resolve(4, 2, None, comm_backend=given, default_comm_backend="a2a")
    assert config.comm_backend == (given or "a2a")
    assert resolve(4, None, None, default_comm_backend="a2a") is None


@pytest.mark.parametrize(
    ("device", "sees_gpu", "wanted"),
    [("cpu", True, "ag_rs"), (None, False, "ag_rs"), (None, True, "a2a")],
)
def test_default_backend_is_sglangs(
    device: str | None, sees_gpu: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: sees_gpu)
    assert default_comm_backend(device) == wanted


def test_off_is_the_parent_in_every_field(server_args: Any) -> None:
    ours = server_args()
    parent = type(ours).__mro__[1]
    assert type(ours).__name__ == "DcpServerArgs" and parent.__name__ == "ServerArgs"
    theirs = resolve_server_args(
        parent(model_path=ours.model_path, device="cpu", random_seed=1)
    )
    names = field_names(parent)
    api = sglang_api()
    assert {n: getattr(api.resolved(ours), n) for n in names} == {
        n: getattr(api.resolved(theirs), n) for n in names
    }
    assert ours.dcp is None and ours.dcp_size == 1 and ours.attn_tp_size is None
    sized = server_args(page_size=4, chunked_prefill_size=101, tp_size=4, dcp_size=1)
    seen = api.resolved(sized)
    assert (seen.page_size, seen.chunked_prefill_size) == (4, 101)
    assert sized.dcp is None


def test_off_holds_before_it_is_resolved(plugins: None, tiny_llama: str) -> None:
    """Other code publishes such arguments, and SGLang counts by their `dcp_size`."""
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(model_path=tiny_llama, device="cpu")
    assert args.dcp_size == 1 and args.dcp is None


@pytest.mark.skipif(
    in_range(sglang_version(), None, "0.5.23"), reason="needs a record, as of 0.5.23"
)
def test_a_record_that_was_refused_is_not_resolved_again(
    plugins: None, tiny_llama: str
) -> None:
    """`finish` refuses the chunk after SGLang has resolved everything."""
    from sglang.srt.server_args import ServerArgs

    sizes = {"tp_size": 4, "dcp_size": 2, "page_size": 4, "chunked_prefill_size": 4}
    args = ServerArgs(model_path=tiny_llama, device="cpu", **sizes)
    with pytest.raises(DcpConfigError, match="--chunked-prefill-size"):
        args.resolve_once()
    with pytest.raises(RuntimeError, match="already failed"):
        args.resolve_once()


WORKER = """
import pickle, sys
args = pickle.load(open(sys.argv[1], "rb"))
args.resolve_once()
print("alive", args.dcp.dcp_size)
"""


def test_a_process_that_loads_plugins_later_stays(
    server_args: Any, tmp_path: Path
) -> None:
    """As a worker of the tokenizer, which gets the arguments first."""
    if not hasattr(server_args(), "resolve_once"):
        pytest.skip("needs a record, as of 0.5.23")
    data = tmp_path / "args"
    data.write_bytes(pickle.dumps(server_args(tp_size=4, dcp_size=2)))
    done = run_python("-c", WORKER, str(data))
    assert "alive 2" in done.stdout, done.stderr[-2000:]


def field_names(record: Any) -> list[str]:
    """Fields of either form of `ServerArgs`."""
    if dataclasses.is_dataclass(record):
        return [field.name for field in dataclasses.fields(record)]
    return list(record.__struct_fields__)


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        pytest.param({"dcp_size": 2}, Layout(4, 2), id="dcp"),
        pytest.param({"attn_tp_size": 1}, Layout(4, 1), id="attn-tp"),
    ],
)
def test_on_counts_pages_in_logical_tokens(
    flags: dict[str, Any], layout: Layout, server_args: Any
) -> None:
    record = server_args(tp_size=4, page_size=6, chunked_prefill_size=101, **flags)
    assert record.dcp == DcpConfig(layout, page_size=6)
    args = sglang_api().resolved(record)
    assert args.page_size == 6 * layout.dcp_size == record.dcp.logical_page_size
    assert args.chunked_prefill_size == 101 // args.page_size * args.page_size
    assert args.attention_backend == "torch_native"
    assert args.cuda_graph_config.prefill.backend == "disabled"


def test_sglangs_own_dcp_is_off_in_a_scheduler(server_args: Any) -> None:
    record = pickle.loads(pickle.dumps(server_args(tp_size=4, dcp_size=2)))
    sglang_api().hide_dcp_size(record)
    assert sglang_api().resolved(record).dcp_size == 1


@pytest.mark.parametrize("dcp_size", [1, 2])
def test_no_resize_after_graph_capture(
    dcp_size: int, server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = server_args(tp_size=4, dcp_size=dcp_size)
    asked = Mock(return_value=True)
    assert post_capture_kv_sizing_planned(asked, args) == (dcp_size == 1)
    assert asked.mock_calls == [call(args)] * (dcp_size == 1)


@pytest.mark.parametrize(
    ("chunk", "wanted"),
    [
        pytest.param(64, 64, id="whole-pages"),
        pytest.param(69, 64, id="cut"),
        pytest.param(8, 8, id="one-page"),
        pytest.param(-1, -1, id="no-chunks"),
    ],
)
def test_chunks_are_whole_logical_pages(
    chunk: int, wanted: int, server_args: Any
) -> None:
    args = server_args(tp_size=4, dcp_size=2, page_size=4, chunked_prefill_size=chunk)
    assert sglang_api().resolved(args).chunked_prefill_size == wanted


def test_chunk_below_a_logical_page_is_refused(server_args: Any) -> None:
    with pytest.raises(DcpConfigError, match="--chunked-prefill-size 4 .* at least 8"):
        server_args(tp_size=4, dcp_size=2, page_size=4, chunked_prefill_size=4)


def test_resolved_arguments_are_no_new_ones(server_args: Any) -> None:
    """Their pages are logical already: a second resolution would multiply them again."""
    done = server_args(tp_size=4, dcp_size=2, page_size=4)
    shown = as_server_info(done)
    assert (shown["page_size"], shown["dcp_page_size"]) == (8, 4)
    with pytest.raises((DcpConfigError, TypeError), match="page_size"):
        resolve_server_args(type(done)(**shown))


@pytest.mark.skipif(
    in_range(sglang_version(), None, "0.5.23"), reason="needs a record, as of 0.5.23"
)
def test_what_a_record_was_asked_for_may_be_asked_again(server_args: Any) -> None:
    import msgspec

    done = server_args(tp_size=4, dcp_size=2, page_size=4)
    again = resolve_server_args(type(done)(**msgspec.structs.asdict(done)))
    assert sglang_api().resolved(again).page_size == 8 and again.dcp == done.dcp


def test_dcp_itself_is_no_argument(server_args: Any) -> None:
    with pytest.raises(TypeError, match="dcp"):
        server_args(dcp=DcpConfig(Layout(2, 1)))


def test_pickled_arguments_require_the_hooks(
    server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_required", False)
    off = pickle.loads(pickle.dumps(server_args()))
    assert off.dcp is None and not verify.hooks_required()
    args = server_args(
        tp_size=4, dcp_size=2, dcp_comm_backend="a2a", dcp_replicate_q_proj=True
    )
    data = pickle.dumps(args)
    assert not verify.hooks_required()
    copied = pickle.loads(data)
    assert verify.hooks_required()
    assert copied == args and type(copied) is type(args)
    assert copied.dcp == DcpConfig(Layout(4, 2), "a2a", True)


def test_server_info_shows_the_layout(server_args: Any) -> None:
    flags = {"dcp_size": 2, "dcp_comm_backend": "a2a", "dcp_replicate_q_proj": True}
    shown = as_server_info(server_args(tp_size=4, **flags))
    wanted = {**flags, "attn_tp_size": 2}
    assert {name: shown[name] for name in wanted} == wanted
    assert json.loads(json.dumps(wanted)) == wanted


@pytest.fixture
def parse(server_args: Any, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments that a command line makes, through SGLang's own parser."""
    from sglang.srt.server_args import prepare_server_args

    # It would close pytest's own handlers.
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    start = ["--model-path", tiny_llama, "--device", "cpu"]
    return lambda line: resolve_server_args(prepare_server_args(start + line.split()))


@pytest.mark.parametrize(
    ("dcp_flag", "attn_flag"),
    [
        pytest.param("--dcp-size", "--attn-tp-size", id="short"),
        pytest.param(
            "--decode-context-parallel-size",
            "--attention-tensor-parallel-size",
            id="long",
        ),
    ],
)
def test_command_line(dcp_flag: str, attn_flag: str, parse: Any) -> None:
    wanted = DcpConfig(Layout(4, 2), "a2a", True)
    more = "--tp-size 4 --dcp-comm-backend a2a --dcp-replicate-q-proj"
    for sizes in (f"{dcp_flag} 2", f"{attn_flag} 2", f"{dcp_flag} 2 {attn_flag} 2"):
        assert parse(f"{more} {sizes}").dcp == wanted
    assert parse("--tp-size 4").dcp is None
    off = parse("--tp-size 4 --dcp-size 2 --no-dcp-replicate-q-proj")
    assert not off.dcp.replicate_q_proj


def test_help_shows_the_flags(plugins: None) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    shown = parser.format_help()
    for flag in (
        "--dcp-size",
        "--decode-context-parallel-size",
        "--attn-tp-size",
        "--attention-tensor-parallel-size",
        "--dcp-comm-backend",
        "--dcp-replicate-q-proj",
    ):
        assert flag in shown


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        pytest.param(
            "--tp-size 4 --dcp-size 3", ["--dcp-size 3", "1, 2, 4"], id="size"
        ),
        pytest.param(
            "--tp-size 4 --dcp-size 2 --dcp-comm-backend symm_a2a",
            [
                "--dcp-comm-backend symm_a2a",
                "NVIDIA GPUs",
                "use --dcp-comm-backend a2a",
            ],
            id="backend",
        ),
        pytest.param(
            "--tp-size 4 --dcp-size 2 --dcp-comm-backend fi_a2a",
            ["--dcp-comm-backend fi_a2a", "MNNVL", "use --dcp-comm-backend a2a"],
            id="fi-a2a",
        ),
        pytest.param(
            "--tp-size 4 --dcp-size 2 --attention-backend fa3",
            ["--attention-backend fa3", "use torch_native"],
            id="attention",
        ),
    ],
)
def test_refused_command_line_exits_with_one_line(
    line: str, parts: list[str], parse: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parse(line)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sglang-dcp: error: ") and shown.count("\n") == 1
    assert [part for part in parts if part not in shown] == []


def test_engine_uses_the_same_class(plugins: None) -> None:
    import sglang
    from sglang.srt import server_args as module

    from sglang_dcp.hooks.dcp_server_args import DcpServerArgs

    assert sglang.Engine.server_args_class is DcpServerArgs is module.ServerArgs


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
