"""Mixes of requests, drawn from a seed. Pure: the same seed and limits give the same mix."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# A byte-level model: these ids are text on any terminal, and the only ones it answers with.
PRINTABLE = range(0x20, 0x7F)
# A pause that aborts waits a whole second in SGLang, so it is drawn seldom.
PAUSES = ("retract", "retract", "in_place", "in_place", "in_place", "abort")
REGEXES = (r"[a-f]+", r"(ab|cd){2,6}", r"[0-9]{1,8}\.[0-9]{2}", r"(yes|no|maybe)")
SCHEMAS = (
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], '
    '"additionalProperties": false}',
    '{"type": "array", "items": {"enum": ["x", "yy", "zzz"]}, "minItems": 1, "maxItems": 3}',
    '{"type": "boolean"}',
)


@dataclass(frozen=True)
class Limits:
    """What a server can take.

    Attributes
    ----------
    prompt : int
        Tokens of the longest prompt that it takes. Longer ones get HTTP 400.
    new_tokens : int
        Tokens of the longest answer that a mix asks for.
    grammar, penalties, priorities, sessions : bool
        Whether requests with a regex or a JSON schema, with penalties, with priorities,
        in sessions are drawn.
    """

    prompt: int
    new_tokens: int = 24
    grammar: bool = True
    penalties: bool = True
    priorities: bool = True
    sessions: bool = True


@dataclass(frozen=True)
class Ask:
    """One request, greedy in all mixes. Times are in seconds; 0 means never, or not asked.

    Attributes
    ----------
    delay : float
        From the start of the mix to the request.
    abort_after, disconnect_after : float
        From the request to its abort by id, or to the end of its connection.
    session : int
        Requests of one number are turns of one session, each sent after the turn before.
        A later turn's prompt follows what was said before.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    delay: float = 0.0
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stream: bool = False
    abort_after: float = 0.0
    disconnect_after: float = 0.0
    session: int = 0
    priority: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    regex: str = ""
    json_schema: str = ""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    min_new_tokens: int = 0
    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = -1

    @property
    def counts_its_tokens(self) -> bool:
        """Whether the next token depends on which tokens were generated."""
        penalties = (self.frequency_penalty, self.presence_penalty)
        return any(penalties) or self.repetition_penalty != 1 or self.min_new_tokens > 0

    @property
    def may_end_early(self) -> bool:
        """Whether the answer may be cut by an abort or a lost connection."""
        return bool(self.abort_after or self.disconnect_after)

    @property
    def has_grammar(self) -> bool:
        """Whether the request waits until its grammar is compiled."""
        return bool(self.regex or self.json_schema)

    def __str__(self) -> str:
        """What is not at its default, and the prompt's length."""
        chosen = {
            name: value
            for name, value in asdict(self).items()
            if name != "ids" and value != getattr(_PLAIN, name)
        }
        return f"{len(self.ids)} tokens, {chosen}"

    def sampling(self) -> dict[str, Any]:
        """The `sampling_params` of this request, without those that are not used."""
        params: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "n": self.n,
            "min_new_tokens": self.min_new_tokens,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        optional = {
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "regex": self.regex,
            "json_schema": self.json_schema,
            "logit_bias": dict(self.logit_bias),
        }
        return {**params, **{name: value for name, value in optional.items() if value}}


_PLAIN = Ask((0,), 0)


@dataclass(frozen=True)
class Pause:
    """The engine pauses `at` seconds into the mix, for `seconds`. `mode` is SGLang's."""

    at: float
    mode: str
    seconds: float


@dataclass(frozen=True)
class Mix:
    """Requests and what happens meanwhile. `flushes` are times of `/flush_cache`."""

    seed: int
    asks: tuple[Ask, ...]
    pauses: tuple[Pause, ...] = ()
    flushes: tuple[float, ...] = ()

    @property
    def aborts_all(self) -> bool:
        """Whether any request may be aborted, by a pause."""
        return any(pause.mode == "abort" for pause in self.pauses)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Mix:
        raw = json.loads(text)
        return Mix(
            raw["seed"],
            tuple(Ask(**_with_tuples(ask)) for ask in raw["asks"]),
            tuple(Pause(**pause) for pause in raw["pauses"]),
            tuple(raw["flushes"]),
        )


def _with_tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def make_mix(seed: int, limits: Limits) -> Mix:
    """The mix of this seed: 3 to 10 requests."""
    draw = random.Random(seed)
    bases = [
        _ids(draw, _length(draw, limits.prompt)) for _ in range(draw.randint(1, 2))
    ]
    asks = [_ask(draw, limits, bases) for _ in range(draw.randint(3, 10))]
    if limits.sessions and draw.random() < 0.15:
        asks += _turns(draw, limits)
    pauses: tuple[Pause, ...] = ()
    if draw.random() < 0.15:
        at, seconds = draw.uniform(0.0, 0.5), draw.uniform(0.01, 0.2)
        pauses = (Pause(round(at, 3), draw.choice(PAUSES), round(seconds, 3)),)
    flushes = (round(draw.uniform(0.0, 0.5), 3),) if draw.random() < 0.1 else ()
    return Mix(seed, tuple(asks), pauses, flushes)


def _ids(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(256) for _ in range(length))


def _length(draw: random.Random, longest: int) -> int:
    """Most prompts are short; some end about a page border, some at the pool's end."""
    kind = draw.random()
    if kind < 0.6:
        wanted = draw.randint(1, 40)
    elif kind < 0.8:
        wanted = 8 * draw.randint(1, 12) + draw.randint(-1, 1)
    elif kind < 0.95:
        wanted = draw.randint(1, longest)
    else:
        wanted = longest - draw.randint(0, 3)
    return max(1, min(longest, wanted))


def _prompt(
    draw: random.Random, limits: Limits, bases: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    if draw.random() < 0.02:
        return _ids(draw, limits.prompt + draw.randint(1, 40))
    if draw.random() < 0.5:
        return _ids(draw, _length(draw, limits.prompt))
    base = draw.choice(bases)
    shared = base[: draw.randint(1, len(base))]
    tail = _ids(draw, draw.choice((0, 1, 2, draw.randint(0, 40))))
    return (shared + tail)[: limits.prompt]


def _ask(draw: random.Random, limits: Limits, bases: Sequence[tuple[int, ...]]) -> Ask:
    ids = _prompt(draw, limits, bases)
    new_tokens = draw.randint(1, limits.new_tokens)
    if draw.random() < 0.9:
        # Else the pool's end may cut the answer.
        new_tokens = max(1, min(new_tokens, limits.prompt - len(ids)))
    more: dict[str, Any] = {}
    if draw.random() < 0.7:
        more["delay"] = round(draw.uniform(0.0, 0.4), 3)
    if limits.priorities and draw.random() < 0.4:
        more["priority"] = draw.randint(1, 3) * 10
    if draw.random() < 0.1:
        more["n"] = draw.randint(2, 3)
    elif draw.random() < 0.3:
        more["stream"] = True
    more.update(_end(draw))
    more.update(_choices(draw, limits, new_tokens))
    more.update(_logprobs(draw, len(ids)))
    return Ask(ids, new_tokens, **more)


def _end(draw: random.Random) -> dict[str, Any]:
    """Abort and disconnect, seldom."""
    kind, after = draw.random(), round(draw.uniform(0.01, 0.6), 3)
    if kind < 0.08:
        return {"abort_after": after}
    return {"disconnect_after": after} if kind < 0.15 else {}


def _choices(draw: random.Random, limits: Limits, new_tokens: int) -> dict[str, Any]:
    """What changes the next token, and what ends an answer."""
    more: dict[str, Any] = {}
    if draw.random() < 0.15:
        more["stop"] = tuple(_text(draw) for _ in range(draw.randint(1, 3)))
    if draw.random() < 0.15:
        more["stop_token_ids"] = tuple(draw.sample(PRINTABLE, draw.randint(1, 5)))
    if more and draw.random() < 0.5:
        more["min_new_tokens"] = draw.randint(1, new_tokens)
    if limits.grammar and draw.random() < 0.12:
        name, known = draw.choice((("regex", REGEXES), ("json_schema", SCHEMAS)))
        return {name: draw.choice(known)}
    if limits.penalties:
        more.update(_penalties(draw))
    if draw.random() < 0.12:
        ids = draw.sample(PRINTABLE, draw.randint(1, 4))
        more["logit_bias"] = {str(i): round(draw.uniform(-5, 5), 2) for i in ids}
    return more


def _penalties(draw: random.Random) -> dict[str, Any]:
    ranges = {
        "frequency_penalty": (-1.0, 2.0),
        "presence_penalty": (-1.0, 2.0),
        "repetition_penalty": (0.7, 1.6),
    }
    chosen = [name for name in ranges if draw.random() < 0.12]
    return {name: round(draw.uniform(*ranges[name]), 2) for name in chosen}


def _text(draw: random.Random) -> str:
    return "".join(
        chr(draw.choice(PRINTABLE)) for _ in range(draw.choice((1, 1, 1, 2)))
    )


def _logprobs(draw: random.Random, length: int) -> dict[str, Any]:
    """Half of the requests ask for none: with log-probabilities chunks are not mixed."""
    if draw.random() < 0.5:
        return {}
    more: dict[str, Any] = {"return_logprob": True}
    if draw.random() < 0.4:
        more["top_logprobs_num"] = draw.randint(1, 5)
    if draw.random() < 0.3:
        more["logprob_start_len"] = draw.randint(0, length - 1)
    return more


def _turns(draw: random.Random, limits: Limits) -> list[Ask]:
    """Two or three turns of one session, which fit into the pool together."""
    turns = draw.randint(2, 3)
    room = max(2, min(30, limits.prompt // (turns + 1)))
    return [
        Ask(
            _ids(draw, draw.randint(1, room // 2)),
            draw.randint(1, room // 2),
            session=1,
            return_logprob=draw.random() < 0.5,
        )
        for _ in range(turns)
    ]
