"""What `bench_speculation.py` starts, asks and sums up, without a server."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bench_speculation
import speculation_report
from bench_speculation import ask, make_server, parse, prepare, servers
from decode_models import MODELS
from helpers.server_stand_in import Server as StandIn
from speculation_drafts import (
    Speculation,
    default_draft,
    environment_of,
    flags_of,
    impossible_draft,
)
from speculation_replies import (
    WARM_TOKENS,
    Arrival,
    Reply,
    check,
    output_tokens,
    reply_of,
    request_body,
    time_together,
)
from speculation_report import (
    FIELDS,
    Row,
    break_even_table,
    read,
    step_table,
    summary,
)
from speculation_sizes import OWN_TOKENS, Size, rank_pool, tokens_of

WHO = ("tiny", 2, "a GPU", "tp", "fa3")
WORDS = "x.csv --device cpu --tp 2 --layouts 2:a2a:q --model tiny-mla+MTP"


def options(more: str = "", folder: Path = Path()) -> Any:
    return parse([str(folder / "x.csv"), *WORDS.split()[1:], *more.split()])


def steady(start: float, step: float, accepted: int, tokens: int) -> Reply:
    """A reply whose verifications take `step` seconds each."""
    steps = (tokens - 1) // accepted
    arrivals = [Arrival(start + i * step, 1 + i * accepted) for i in range(steps + 1)]
    return Reply(arrivals, 512, steps)


def test_a_steady_batch_has_its_step_time_however_it_started() -> None:
    replies = [steady(0.0, 0.03, 3, 61), steady(0.2, 0.03, 3, 61)]
    timed = time_together(replies)
    assert timed.means == pytest.approx([0.01, 0.01])
    assert timed.gaps == pytest.approx([0.01] * len(timed.gaps))
    row = summary(WHO, ("mtp", 3, 3), (512, 2, 1), [replies])
    assert (row.step_ms, row.step_p95_ms, row.token_ms) == (30.0, 30.0, 10.0)
    assert (row.repeats, row.cached) == (1, 512)


def test_only_steps_of_the_whole_batch_are_timed() -> None:
    """Alone, a request is fast: before the other's first tokens, and after its last."""
    slow = [Arrival(10.0 + i, 1 + i) for i in range(40)]
    other = [Arrival(5.0 + i / 10, 1 + i) for i in range(50)]
    other += [Arrival(10.0 + i, 50 + i) for i in range(1, 40)]
    other += [Arrival(49.0 + i / 10, 89 + i) for i in range(1, 50)]
    timed = time_together([Reply(slow, 0, 0), Reply(other, 0, 0)])
    assert set(timed.gaps) == {1.0} and timed.means == [1.0, 1.0]
    assert len(timed.gaps) == 2 * (40 - WARM_TOKENS)


def test_pieces_that_came_as_one_count_as_several_steps() -> None:
    arrivals = [Arrival(float(i), 1 + i) for i in range(40) if i % 4]
    timed = time_together([Reply(arrivals, 0, 0)])
    assert set(timed.gaps) == {1.0} and timed.means == [1.0]


def test_requests_that_hardly_ran_together_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="--output-len"):
        time_together([steady(0.0, 1.0, 1, 20), steady(10.0, 1.0, 1, 20)])


def lines(pieces: Sequence[dict[str, Any]]) -> list[tuple[float, bytes]]:
    texts = [f"data: {json.dumps(piece)}\n" for piece in pieces] + ["data: [DONE]\n"]
    separated = [line for text in texts for line in (text, "\n")]
    return [(float(place), text.encode()) for place, text in enumerate(separated)]


def test_a_stream_is_read_with_the_time_of_each_piece() -> None:
    def piece(tokens: int, **more: int) -> dict[str, Any]:
        return {"meta_info": {"completion_tokens": tokens, "cached_tokens": 9, **more}}

    found = reply_of(lines([piece(1), piece(4), piece(7), piece(7, spec_verify_ct=2)]))
    assert found == ([(0.0, 1), (2.0, 4), (4.0, 7)], 9, 2)
    check([found], Speculation(3, 3), 7)
    with pytest.raises(RuntimeError, match="7 tokens by 2 verifications"):
        check([found], Speculation(3, 2), 7)
    with pytest.raises(RuntimeError, match="too long"):
        reply_of(lines([piece(1), {"error": {"message": "too long"}}]))


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_replies_are_whole_verifications(accepted: int) -> None:
    for length in range(2, 50):
        tokens = output_tokens(length, accepted)
        assert length <= tokens < length + accepted
        assert (tokens - 1) % accepted == 0


class Server:
    """Stands in for a live one: it answers as the simulation would."""

    def __init__(self, pool: int) -> None:
        self.pool = pool
        self.whole: list[list[int]] = []
        self.asked: list[dict[str, Any]] = []

    def info_or_prefill(self, url: str, payload: Any = None) -> Any:
        if payload is None:
            return {"max_total_num_tokens": self.pool}
        self.whole.append(payload["input_ids"])
        return {"meta_info": {"cached_tokens": 0}}

    def stream(self, url: str, body: bytes) -> Reply:
        self.asked.append(json.loads(body))
        return steady(0.0, 0.1, 2, self.asked[-1]["sampling_params"]["max_new_tokens"])


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server(100_000)
    monkeypatch.setattr("live_client.http_json", found.info_or_prefill)
    monkeypatch.setattr(bench_speculation, "stream", found.stream)
    return found


def test_all_requests_share_the_prefix_that_came_before(live: Server) -> None:
    run = options("--contexts 500 200 --batches 1 3 --repeats 2 --output-len 40")
    [[_, served], *_] = servers(
        options("--drafts 1:2 --without-off --at-once 2 --contexts 500")
    )
    found = dict(ask(run, served, ""))
    assert [len(ids) for ids in live.whole] == [200, 500]
    assert live.whole[1][:200] == live.whole[0]
    assert list(found) == [Size(200, 1), Size(200, 3), Size(500, 1), Size(500, 3)]
    assert [len(repeats) for repeats in found.values()] == [2] * 4
    prompts = [request["input_ids"] for request in live.asked]
    assert len({tuple(ids) for ids in prompts}) == len(prompts) == 2 * 3 * (1 + 3)
    for ids in prompts:
        assert ids[:-OWN_TOKENS] == live.whole[len(ids) > 300]


def test_requests_with_prefixes_of_their_own(live: Server) -> None:
    run = options("--contexts 300 --batches 1 3 --repeats 1 --own-prefixes")
    [[served], *_] = servers(options("--drafts 1:2 --without-off --without-plain"))
    live.pool = 3 * 300 + tokens_of(run, 3)
    assert rank_pool(run, 1) >= live.pool
    found = dict(ask(run, served, ""))
    assert [len(ids) for ids in live.whole] == [300] * 3 and all(found.values())
    last = [request["input_ids"][:300] for request in live.asked[-3:]]
    assert last == live.whole and len(set(map(tuple, last))) == 3


def test_what_does_not_fit_is_not_asked(live: Server) -> None:
    run = options("--contexts 200 99000 --batches 1 --repeats 1 --output-len 40")
    live.pool = 99_000
    [[served], *_] = servers(options("--drafts 1:2 --without-off --without-plain"))
    found = dict(ask(run, served, ""))
    assert found[Size(99_000, 1)] == [] and len(live.whole) == 1


def test_layouts_with_one_draft_are_up_together() -> None:
    groups = servers(options("--drafts 1:2 3:3 --at-once 2"))
    assert [[served.name for served in group] for group in groups] == [
        ["tp off", "2:a2a:q off"],
        ["tp k1-a2", "2:a2a:q k1-a2"],
        ["tp k3-a3", "2:a2a:q k3-a3"],
    ]
    [[alone]] = servers(options("--drafts 3:4 --without-off --without-plain"))
    assert alone.name == "2:a2a:q k3-a4"


def test_the_pool_of_all_ranks_holds_the_largest_size() -> None:
    run = options("--contexts 5000 1000 --batches 8 1 --page-size 16")
    need = 5000 + tokens_of(run, 8)
    for dcp_size in (1, 2, 3):
        pool = rank_pool(run, dcp_size)
        assert pool % 16 == 0 and pool * dcp_size > need
    assert rank_pool(options("--max-total-tokens 77"), 2) == 77


def test_servers_differ_in_layout_and_speculation_only(tmp_path: Path) -> None:
    run = options("--drafts 3:2", tmp_path)
    prepared = prepare(run, tmp_path)
    [[off], [dcp], [_], [both]] = servers(run)
    start = {one: make_server(run, one, prepared).command for one in (off, dcp, both)}
    assert "--speculative-algorithm" not in start[off] + start[dcp]
    assert "--dcp-size" not in start[off]
    command = " ".join(start[both])
    assert "--speculative-algorithm EAGLE --speculative-num-steps 3" in command
    assert f"--speculative-draft-model-path {prepared.target}" in command
    env = make_server(run, both, prepared)._env
    assert float(env["SGLANG_SIMULATE_ACC_LEN"]) == 2
    assert "SGLANG_SIMULATE_ACC_LEN" not in make_server(run, dcp, prepared)._env
    longest = json.loads((prepared.target / "config.json").read_text())
    assert longest["max_position_embeddings"] > max(run.contexts) + run.output_len


def test_drafts_by_model(tmp_path: Path) -> None:
    assert default_draft("tiny-mla+MTP") == "mtp"
    assert default_draft("tiny-mla") == flags_draft("ngram") == "ngram"
    assert default_draft("Qwen3-30B-A3B/4") == "eagle3"
    for model in MODELS:
        assert impossible_draft(default_draft(model), model) is None
    assert impossible_draft("mtp", "tiny-mla") and impossible_draft(
        "eagle3", "tiny-mla"
    )
    run = parse([str(tmp_path / "x.csv"), *"--device cpu --tp 2 --model tiny".split()])
    prepared = prepare(run, tmp_path)
    head = json.loads((prepared.draft / "config.json").read_text())
    assert head["architectures"] == ["LlamaForCausalLMEagle3"]
    for name in ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim"):
        assert head[name] == MODELS["tiny"][name]


def flags_draft(draft: str) -> str:
    """The draft of which the flags name no model."""
    flags = flags_of(Speculation(3, 3), draft, Path("head"))
    assert "--speculative-draft-model-path" not in flags
    assert flags[-2:] == ["--speculative-ngram-max-bfs-breadth", "1"]
    return draft


def test_ngram_keeps_no_tokens_of_drafts() -> None:
    """SGLang ends a server with NGRAM that should."""
    modes = {
        draft: environment_of(Speculation(3, 2), draft)[
            "SGLANG_SIMULATE_ACC_TOKEN_MODE"
        ]
        for draft in ("mtp", "eagle3", "ngram")
    }
    assert modes["mtp"] == modes["eagle3"] == "real-draft-token"
    assert modes["ngram"] == "fixed"


@pytest.mark.parametrize("text", ["0:1", "3:5", "3:0", "3", "a:b"])
def test_a_draft_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        options(f"--drafts {text}")


def row(layout: str, steps: int, accepted: int, step_ms: float) -> Row:
    how = ("mtp" if steps else "-", steps, accepted)
    times = (step_ms, step_ms, step_ms / accepted)
    return Row(*WHO[:3], layout, "fa3", *how, 512, 1, 1, *times, 3, 512)


def test_tables(tmp_path: Path) -> None:
    rows = [
        row("tp", 0, 1, 10.0),
        row("2:a2a", 0, 1, 8.0),
        row("tp", 3, 2, 20.0),
        row("2:a2a", 3, 2, 12.0),
        summary(WHO, ("mtp", 3, 2), (4096, 1, 1), []),
    ]
    file = tmp_path / "x.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([FIELDS, *rows])
    assert read(file) == rows
    assert step_table(rows)[1:] == [
        ["512", "1", "0", "1", "10.00 (10.00), 10.00", "8.00 (8.00), 8.00, x 0.80"],
        ["512", "1", "3", "2", "20.00 (20.00), 10.00", "12.00 (12.00), 6.00, x 0.60"],
        ["4,096", "1", "3", "2", "does not fit", "-"],
    ]
    assert break_even_table(rows)[1:] == [["512", "1", "3", "2.00", "1.50"]]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": "other"}, "model"),
        ({"weights": "fp8"}, "weights"),
        ({"draft": "ngram"}, "draft"),
        ({"prefixes": 2}, "prefixes"),
        ({"steps": 3}, ""),
        # Servers without speculation are measured beside any draft.
        ({"draft": "-", "steps": 0, "accepted": 1}, ""),
    ],
)
def test_runs_that_no_line_tells_apart_are_not_printed_as_one(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = summary(WHO, ("mtp", 1, 2), (512, 2, 1), [[steady(0.0, 0.01, 2, 41)] * 2])
    names = []
    for name, one in (("a", row), ("b", row._replace(**changes))):
        names.append(str(tmp_path / name))
        with open(names[-1], "w", newline="") as lines:
            csv.writer(lines).writerows([FIELDS, one])
    assert speculation_report.main(names) == (2 if said else 0)
    printed = capsys.readouterr().out
    assert (f"these files differ in {said}:" in printed) == bool(said)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What happened, in order. Servers with DCP that speculate never get ready."""
    events: list[str] = []

    def make(run: Any, served: Any, prepared: Any) -> StandIn:
        broken = served.layout.dcp_size > 1 and served.speculation.steps > 0
        return StandIn(served.name, events, broken, tmp_path / "log")

    def rows(run: Any, served: Any, url: str) -> Any:
        who = (*WHO[:3], served.layout.name, "fa3")
        how = ("mtp", *served.speculation)
        yield summary(who, how, (4096, 1, 1), [[steady(0.0, 0.1, how[2], 61)]])

    monkeypatch.setattr(bench_speculation, "make_server", make)
    monkeypatch.setattr(bench_speculation, "rows_of", rows)
    return events


def test_servers_with_one_draft_are_up_together_and_one_that_fails_leaves_a_line(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{tmp_path}/{WORDS} --drafts 1:2 --contexts 4096 --at-once 2"
    assert bench_speculation.main(words.split()) == 1
    assert started == [
        *("start tp off", "start 2:a2a:q off", "end 2:a2a:q off", "end tp off"),
        *("start tp k1-a2", "start 2:a2a:q k1-a2", "stop 2:a2a:q k1-a2"),
        *("end 2:a2a:q k1-a2", "end tp k1-a2"),
    ]
    told = capsys.readouterr().out
    assert "2:a2a:q k1-a2: not ready" in told
    assert "tp: 512 of 4096 tokens came from the cache" in told
    found = [(row.layout, row.steps) for row in read(tmp_path / "x.csv")]
    assert found == [("tp", 0), ("2:a2a:q", 0), ("tp", 1)]


def test_the_plugin_of_the_tests_is_in_all_servers_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    run = options("--tests-plugin --drafts 1:2", tmp_path)
    prepared = prepare(run, tmp_path)
    for [served] in servers(run):
        env = make_server(run, served, prepared)._env
        first, *_, last = env["PYTHONPATH"].split(os.pathsep)
        assert list(Path(first).glob("*.dist-info/entry_points.txt"))
        assert last == "/inherited"
        assert "EAGLE" in env["SGLANG_DCP_TEST_SPECULATES"].split(",")
    (tmp_path / "without").mkdir()
    assert prepare(options(), tmp_path / "without").env == {}


def test_weights_are_quantized_and_named(tmp_path: Path) -> None:
    prepared = prepare(options("--quantization fp8-tensor"), tmp_path)
    config = json.loads((prepared.target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    replies = [[steady(0.0, 0.1, 2, 61)]]
    for repeats in (replies, []):
        found = summary(WHO, ("mtp", 1, 2), (512, 1, 1), repeats, "fp8-tensor")
        assert found.weights == "fp8-tensor"


def test_a_request_asks_for_its_tokens() -> None:
    asked = json.loads(request_body([5, 6], 7))
    assert asked["input_ids"] == [5, 6] and asked["stream"]
    assert asked["sampling_params"]["max_new_tokens"] == 7
    assert asked["sampling_params"]["ignore_eos"]
