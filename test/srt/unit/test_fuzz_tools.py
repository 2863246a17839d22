"""The fuzz itself: what it draws, what it accepts, and how it makes a mix small."""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fuzz import cuda, rest
from fuzz.client import Answer, Lost, Output, Row, reference_ask
from fuzz.compare import Judge
from fuzz.mixes import Ask, Limits, Mix, Pause, make_mix
from fuzz.shrink import shrink
from fuzz.soak import GROWTH_BYTES, USERS, soak

LIMITS = Limits(prompt=250)
TOLERANCE = 1e-3
ASK = Ask((1, 2, 3), 3, return_logprob=True, top_logprobs_num=2, logprob_start_len=0)
OUTPUT = Output(
    ids=[65, 66, 67],
    text="ABC",
    finish="length",
    logprobs=[(-0.1, 65), (-0.2, 66), (-0.3, 67)],
    top=[[(-0.1, 65), (-3.0, 70)], [(-0.2, 66), (-3.0, 70)], [(-0.3, 67), (-3.0, 70)]],
    input_logprobs=[(None, 1), (-4.0, 2), (-5.0, 3)],
    input_top=[[], [(-1.0, 9), (-2.0, 8)], [(-1.0, 9), (-2.0, 8)]],
)

NEAR_TIE: list[list[Row]] = [OUTPUT.top[0], [(-0.2, 66), (-0.2005, 70)], OUTPUT.top[2]]


def faults(got: Answer, want: Answer = Answer(200, [OUTPUT]), ask: Ask = ASK) -> Any:
    return Judge(250, TOLERANCE).faults(Mix(0, (ask,)), [got], [want])


# --- generator


def test_a_seed_gives_one_mix_which_json_holds() -> None:
    for seed in range(300):
        mix = make_mix(seed, LIMITS)
        assert mix == make_mix(seed, LIMITS)
        assert Mix.from_json(mix.to_json()) == mix
        assert mix != make_mix(seed + 1, LIMITS)


def test_mixes_stay_within_the_limits() -> None:
    plain = Limits(
        250, grammar=False, penalties=False, priorities=False, sessions=False
    )
    for seed in range(300):
        for ask in make_mix(seed, plain).asks:
            assert len(ask.ids) <= plain.prompt + 40
            assert 1 <= ask.max_new_tokens <= plain.new_tokens
            assert ask.min_new_tokens <= ask.max_new_tokens
            assert ask.logprob_start_len < len(ask.ids)
            assert not (ask.regex or ask.json_schema or ask.priority or ask.session)
            assert not (ask.frequency_penalty or ask.presence_penalty)
            assert ask.repetition_penalty == 1


def test_two_hundred_mixes_hold_everything() -> None:
    mixes = [make_mix(seed, LIMITS) for seed in range(200)]
    asks = [ask for mix in mixes for ask in mix.asks]
    for name in Ask.__dataclass_fields__:
        if name not in ("temperature", "top_p"):  # of the soak
            assert len({str(getattr(ask, name)) for ask in asks}) > 1, name
    lengths = {len(ask.ids) for ask in asks}
    assert {1, 250} <= lengths and max(lengths) > 250
    assert {pause.mode for mix in mixes for pause in mix.pauses} == {
        "retract",
        "in_place",
        "abort",
    }
    assert any(mix.flushes for mix in mixes)
    assert any(len(ask.ids) + ask.max_new_tokens > 251 for ask in asks)
    assert shared_prefixes(mixes) > 100


def shared_prefixes(mixes: list[Mix]) -> int:
    """Pairs of requests of one mix whose prompts begin with the same three tokens."""
    return sum(
        a.ids[:3] == b.ids[:3] and len(a.ids) > 3
        for mix in mixes
        for index, a in enumerate(mix.asks)
        for b in mix.asks[:index]
    )


# --- comparer


def test_equal_answers_have_no_fault() -> None:
    judge = Judge(250, TOLERANCE)
    close = replace(OUTPUT, logprobs=[(-0.1005, 65), (-0.2, 66), (-0.3, 67)])
    answers = [Answer(200, [close])]
    assert not judge.faults(Mix(0, (ASK,)), answers, [Answer(200, [OUTPUT])])
    assert judge.counts.tokens == 3 and judge.counts.logprobs > 3
    assert judge.counts.largest == pytest.approx(5e-4)


DAMAGE: dict[str, Callable[[Output], Output]] = {
    "token": lambda o: replace(o, ids=[65, 70, 67]),
    "first token": lambda o: replace(o, ids=[70, 66, 67]),
    "one token less": lambda o: replace(o, ids=[65, 66]),
    "one token more": lambda o: replace(o, ids=[65, 66, 67, 68]),
    "log-probability": lambda o: replace(
        o, logprobs=[(-0.1, 65), (-0.202, 66), (-0.3, 67)]
    ),
    "no number": lambda o: replace(
        o, logprobs=[(-0.1, 65), (float("nan"), 66), (-0.3, 67)]
    ),
    "lost log-probability": lambda o: replace(o, logprobs=o.logprobs[:2]),
    "top value": lambda o: replace(o, top=[[(-0.1, 65), (-3.1, 70)], *o.top[1:]]),
    "prompt": lambda o: replace(o, input_logprobs=[(None, 1), (-4.0, 2), (-5.01, 3)]),
    "prompt's end": lambda o: replace(o, input_logprobs=o.input_logprobs[:2]),
    "prompt's top": lambda o: replace(
        o, input_top=[[], [(-1.0, 9), (-2.0, 8)], [(-1.1, 9), (-2.0, 8)]]
    ),
    "text": lambda o: replace(o, text="ABX"),
    "end": lambda o: replace(o, finish="stop"),
    "what ended it": lambda o: replace(o, matched=67),
    "no end": lambda o: replace(o, finish=""),
    "an abort": lambda o: replace(o, finish="abort"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_a_fault(name: str) -> None:
    assert len(faults(Answer(200, [DAMAGE[name](OUTPUT)]))) == 1


def test_statuses_that_are_faults() -> None:
    assert faults(Answer(500, message="out of memory"))
    assert faults(Answer(400, message="too long"))
    assert faults(Answer(0))
    assert faults(Answer(200, [OUTPUT, OUTPUT]))
    assert faults(Answer(200, [OUTPUT]), Answer(400))
    assert not faults(Answer(400), Answer(400))


def test_a_near_tie_is_none_and_ends_the_comparison() -> None:
    want = replace(OUTPUT, top=NEAR_TIE)
    got = replace(OUTPUT, ids=[65, 70, 99], logprobs=[], top=[], input_logprobs=[])
    assert not faults(Answer(200, [got]), Answer(200, [want]))
    far = replace(OUTPUT, top=[OUTPUT.top[0], [(-0.2, 66), (-0.3, 70)], OUTPUT.top[2]])
    assert faults(Answer(200, [got]), Answer(200, [far]))


def test_an_aborted_answer_is_compared_as_far_as_it_came() -> None:
    ask = replace(ASK, abort_after=0.1)
    part = replace(OUTPUT, ids=[65, 66], logprobs=OUTPUT.logprobs[:2], finish="abort")
    assert not faults(Answer(200, [part]), ask=ask)
    assert not faults(Answer(503, message="Aborted"), ask=ask)
    assert not faults(Answer(400, message="Aborted by AbortReq."), ask=ask)
    assert faults(Answer(400, message="too long"), ask=ask)
    queued = Answer(200, [replace(OUTPUT, ids=[])], "Abort in waiting queue")
    assert not faults(queued, Answer(400), ask) and faults(queued, Answer(400))
    wrong = replace(part, ids=[65, 70])
    assert faults(Answer(200, [wrong]), ask=ask)
    assert faults(Answer(500, message="list index out of range"), ask=ask)
    mix = Mix(0, (ASK,), (Pause(0.0, "abort", 0.1),))
    judge = Judge(250, TOLERANCE)
    assert not judge.faults(mix, [Answer(200, [part])], [Answer(200, [OUTPUT])])


def test_the_one_token_after_an_abort_at_its_grammar_is_not_compared() -> None:
    ask = replace(ASK, regex="[A-C]+", stream=True)
    one = replace(OUTPUT, ids=[58], logprobs=[], top=[], finish="abort")
    mix = Mix(0, (ask,), (Pause(0.0, "abort", 0.1),))

    def found(*outputs: Output, status: int = 400, of: Mix = mix) -> list[str]:
        got = Answer(status, list(outputs), "Aborted by AbortReq.")
        return Judge(250, TOLERANCE).faults(of, [got], [Answer(200, [OUTPUT])])

    assert not found(one) and not found()
    assert found(replace(one, ids=[58, 38])) and found(replace(one, finish="length"))
    # A request that runs has its grammar, and is aborted with another status.
    assert found(one, status=200)
    assert found(one, of=replace(mix, asks=(replace(ask, regex=""),)))
    assert found(one, of=replace(mix, pauses=()))


def test_only_the_pools_end_may_cut_an_answer() -> None:
    part = replace(OUTPUT, ids=[65, 66], logprobs=OUTPUT.logprobs[:2], text="AB")
    long = replace(ASK, ids=(7,) * 249)
    assert not faults(Answer(200, [part]), ask=long)
    assert faults(Answer(200, [part]))


def test_a_later_turn_is_not_compared_after_a_near_tie() -> None:
    asks = (replace(ASK, session=1), replace(ASK, session=1))
    want = [Answer(200, [replace(OUTPUT, top=NEAR_TIE)])] * 2
    tied = replace(OUTPUT, ids=[65, 70, 99], logprobs=[], top=[])
    other = replace(OUTPUT, ids=[90, 90, 90])
    got = [Answer(200, [tied]), Answer(200, [other])]
    assert not Judge(250).faults(Mix(0, asks), got, want)
    got = [Answer(200, [OUTPUT]), Answer(200, [other])]
    assert len(Judge(250).faults(Mix(0, asks), got, want)) == 1


def test_the_reference_gets_the_same_request_alone() -> None:
    asks = [ask for seed in range(50) for ask in make_mix(seed, LIMITS).asks]
    for ask in asks:
        alone = reference_ask(ask, (5, 6))
        assert alone.ids == (5, 6, *ask.ids) and not alone.may_end_early
        assert alone.sampling() == ask.sampling()


# --- shrinker


def test_shrinks_to_what_fails() -> None:
    """A stop token in a request, and a second request with at least five tokens."""

    def fails(mix: Mix) -> bool:
        return any(a.stop_token_ids for a in mix.asks) and any(
            len(b.ids) >= 5 and not b.stop_token_ids for b in mix.asks
        )

    seeds = [s for s in range(100) if fails(make_mix(s, LIMITS))]
    assert len(seeds) > 10
    for seed in seeds[:10]:
        least = shrink(make_mix(seed, LIMITS), fails, tries=2000)
        assert fails(least) and len(least.asks) == 2
        assert not least.pauses and not least.flushes
        assert sorted(len(ask.ids) for ask in least.asks) == [1, 5]
        stops = [ask for ask in least.asks if ask.stop_token_ids]
        assert stops == [Ask(stops[0].ids, 1, stop_token_ids=stops[0].stop_token_ids)]


def test_a_mix_that_fails_by_chance_ends_the_search() -> None:
    draw, asked = random.Random(0), []

    def fails(mix: Mix) -> bool:
        asked.append(mix)
        return draw.random() < 0.1

    shrink(make_mix(3, LIMITS), fails, tries=50)
    assert len(asked) <= 50


# --- a server at rest


def metrics(rank: int, available: int, evictable: int = 4, decode: int = 7) -> str:
    labels = f'model="m",tp_rank="{rank}"'
    return (
        f"sglang:kv_available_tokens{{{labels}}} {available}.0\n"
        f"sglang:kv_evictable_tokens{{{labels}}} {evictable}.0\n"
        f"sglang:max_total_num_tokens{{{labels}}} 256.0\n"
        f'sglang:realtime_tokens_total{{mode="decode",{labels}}} {decode}.0\n'
    )


def trouble(text: str) -> str:
    class Fake:
        async def get(self, path: str) -> str:
            return text

    try:
        asyncio.run(rest.check_ranks(Fake(), ranks=2))  # type: ignore[arg-type]
    except Lost as error:
        return str(error)
    return ""


def test_ranks_in_step_with_whole_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "LAG_SECONDS", 0.0)
    assert not trouble(metrics(0, 252) + metrics(1, 252))
    assert "rank 1" in trouble(metrics(0, 252) + metrics(1, 252, decode=8))
    assert "252 of 256" in trouble(metrics(0, 248) + metrics(1, 248))
    assert "numbers of 1 ranks" in trouble(metrics(0, 252))


# --- forced tokens


def test_forced_tokens_are_compared_exactly_their_log_probabilities_are_not() -> None:
    judge = Judge(250, float("inf"))
    far = replace(OUTPUT, logprobs=[(-9.0, 65), (-9.0, 66), (-9.0, 67)])
    mix, want = Mix(0, (ASK,)), [Answer(200, [replace(OUTPUT, top=NEAR_TIE)])]
    assert not judge.faults(mix, [Answer(200, [far])], want)
    other = replace(OUTPUT, ids=[65, 70, 67])
    assert judge.faults(mix, [Answer(200, [other])], want)
    no_number = replace(OUTPUT, logprobs=[(float("nan"), 65), *OUTPUT.logprobs[1:]])
    assert judge.faults(mix, [Answer(200, [no_number])], want)


def test_a_distance_is_measured_by_that_of_plain_tp_2() -> None:
    want = [Answer(200, [OUTPUT])]

    def off_by(gap: float) -> cuda.Distance:
        distance = cuda.Distance()
        rows: list[Row] = [(-0.1 - gap, 65), (-0.2, 66), (-0.3, 67)]
        distance.add([ASK], [Answer(200, [replace(OUTPUT, logprobs=rows)])], want)
        return distance

    spread = off_by(0.03)
    assert spread.tokens == 3 and spread.mean == pytest.approx(0.01)
    assert off_by(0.04).within(spread)
    assert not off_by(0.05).within(spread)
    assert not off_by(float("nan")).within(spread)


def test_a_token_without_a_number_on_either_side_is_not_measured() -> None:
    def distance_of(*values: float | None, ask: Ask = ASK) -> cuda.Distance:
        distance = cuda.Distance()
        sides = [replace(OUTPUT, logprobs=[(value, 65)]) for value in values]
        distance.add([ask], [Answer(200, sides[:1])], [Answer(200, sides[1:])])
        return distance

    assert distance_of(None, None) == cuda.Distance(left_out=1)
    counting = replace(ASK, min_new_tokens=2)
    for one_sided in ((None, -0.1), (-0.1, None)):
        assert math.isnan(distance_of(*one_sided).mean)
        assert distance_of(*one_sided, ask=counting) == cuda.Distance(left_out=1)
    assert distance_of(-0.2, -0.1, ask=counting).tokens == 1


@pytest.mark.parametrize("name", cuda.SETTINGS)
def test_plain_gpu_servers_have_the_backend_and_no_dcp_flag(name: str) -> None:
    tested, tp1, tp2 = cuda.specs(cuda.SETTINGS[name], "--log-level debug")
    for plain in (tp1, tp2):
        assert "dcp" not in plain.flags and "attn-tp" not in plain.flags
        backend = plain.flags.split("--attention-backend ")[1].split()[0]
        assert f"--attention-backend {backend} " in tested.flags
        assert "--log-level debug" in plain.flags and plain.kind == tested.kind
    assert (tested.gpus, tp1.gpus, tp2.gpus) == (2, 1, 2)


# --- soak


class Sampled:
    """A client whose server answers, and from some answer on aborts what none aborted."""

    def __init__(self, healthy: int) -> None:
        self.healthy = healthy
        self.asked = 0

    async def ask(self, ask: Ask) -> Answer:
        await asyncio.sleep(0.001)
        self.asked += 1
        finish = "abort" if self.asked > self.healthy else "length"
        return Answer(200, [Output(ids=[65], text="A", finish=finish)])


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle(client: Any, ranks: int) -> None: ...

    monkeypatch.setattr(rest, "settle", settle)
    monkeypatch.setattr(rest, "resident_bytes", lambda group: {"rank": 1 << 30})


def test_soak_prints_its_counts(at_rest: None, capsys: Any) -> None:
    client: Any = Sampled(healthy=1 << 30)
    found = asyncio.run(soak(client, 1, 2, 60, 0.005))
    assert found.requests == client.asked > USERS
    counts = re.findall(
        r"0 minutes left of the round: (\d+) requests", capsys.readouterr().out
    )
    # Answers that were under way then came later.
    assert counts and 0 < int(counts[0]) <= found.requests


def test_soak_checks_the_server_after_each_round(
    at_rest: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[int] = []
    memory = iter([100, 100, 100, 100, 100, 100 + 2 * GROWTH_BYTES])

    async def settle(client: Any, ranks: int) -> None:
        settled.append(client.asked)

    monkeypatch.setattr(rest, "settle", settle)
    monkeypatch.setattr(rest, "resident_bytes", lambda group: {"rank": next(memory)})
    monkeypatch.setattr("fuzz.soak.ROUND_MINUTES", 0.001)
    client: Any = Sampled(healthy=1 << 30)
    with pytest.raises(Lost, match="grew"):
        asyncio.run(soak(client, 1, 2, 60, 0.003))
    assert len(settled) == 3 and settled == sorted({*settled})


def test_soak_ends_at_once_for_a_lost_answer(at_rest: None) -> None:
    client: Any = Sampled(healthy=100)
    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(asyncio.wait_for(soak(client, 1, 2, 60, 10), 5))
    assert isinstance(caught.value.exceptions[0], Lost)
