"""Sends a mix to a live server as its users would, or one request after the other."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from fuzz.mixes import Ask, Mix, Pause

# Longer than any request of a mix takes on a busy machine: later it is lost.
LOST_SECONDS = 180.0
Row = tuple[float | None, int]


@dataclass(frozen=True)
class Output:
    """One of the `n` outputs of a request, as far as it came.

    Attributes
    ----------
    logprobs, input_logprobs : list of (log-probability or None, token id)
    top, input_top : list of such lists, best first
    finish : str
        "length", "stop", "abort", or "" where the end did not come.
    """

    ids: list[int]
    text: str = ""
    finish: str = ""
    matched: Any = None
    logprobs: list[Row] = field(default_factory=list)
    top: list[list[Row]] = field(default_factory=list)
    input_logprobs: list[Row] = field(default_factory=list)
    input_top: list[list[Row]] = field(default_factory=list)
    retractions: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. Status 0 where the client went away before the answer."""

    status: int
    outputs: list[Output] = field(default_factory=list)
    message: str = ""


class Lost(RuntimeError):
    """A request was not answered, or the server did not come to rest."""


class Client:
    """One server. Use it as an asynchronous context manager."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url
        # One pause at a time: a pause that aborts waits for requests to end, and blocks
        # the continuation of one in place, which holds them. That is SGLang's own.
        self._pausing = asyncio.Lock()

    async def __aenter__(self) -> Client:
        # Without a limit: a paused server holds many connections.
        self._http = aiohttp.ClientSession(
            self._base_url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=LOST_SECONDS),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def post(self, path: str, payload: object = None) -> tuple[int, str]:
        """Status and body of an answer."""
        async with self._http.post(path, json=payload) as answer:
            return answer.status, await answer.text()

    async def get(self, path: str) -> str:
        """Body of an answer with status 200. Raises `Lost` for another status."""
        async with self._http.get(path) as answer:
            if answer.status != 200:
                raise Lost(f"{path} answered with status {answer.status}")
            return await answer.text()

    async def run(self, mix: Mix) -> list[Answer]:
        """All answers of a mix, in the order of its requests."""
        chains: dict[int, list[int]] = {}
        for index, ask in enumerate(mix.asks):
            chains.setdefault(ask.session or -index - 1, []).append(index)
        found: dict[int, Answer] = {}
        async with asyncio.TaskGroup() as tasks:
            for chain in chains.values():
                tasks.create_task(self._chain(mix, chain, found))
            for pause in mix.pauses:
                tasks.create_task(self._pause(pause))
            for at in mix.flushes:
                tasks.create_task(self._flush_at(at))
        return [found[index] for index in range(len(mix.asks))]

    async def ask(
        self, ask: Ask, session: Mapping[str, Any] | None = None, rid: str = ""
    ) -> Answer:
        """The answer to one request, with its abort or disconnect."""
        rid = rid or uuid.uuid4().hex
        payload: dict[str, Any] = {
            "input_ids": list(ask.ids),
            "sampling_params": ask.sampling(),
            "rid": rid,
            "stream": ask.stream,
            "return_logprob": ask.return_logprob,
            "top_logprobs_num": ask.top_logprobs_num,
            "logprob_start_len": ask.logprob_start_len,
        }
        if ask.priority:
            payload["priority"] = ask.priority
        if session:
            payload["session_params"] = dict(session)
        came: list[Answer] = []
        sending = asyncio.create_task(self._send(payload, came))
        if ask.abort_after:
            aborting = asyncio.create_task(self._abort(rid, ask.abort_after))
        limit = ask.disconnect_after or LOST_SECONDS
        try:
            done, _ = await asyncio.wait([sending], timeout=limit)
        except asyncio.CancelledError:
            sending.cancel()
            raise
        if ask.abort_after:
            await aborting
        if done:
            return sending.result()
        # Ending the task closes the connection.
        sending.cancel()
        await asyncio.wait([sending])
        if not ask.disconnect_after:
            raise Lost(f"no answer in {LOST_SECONDS:.0f} s: {ask}")
        return replace(came[-1], status=0) if came else Answer(0)

    async def _send(self, payload: Mapping[str, Any], came: list[Answer]) -> Answer:
        try:
            async with self._http.post("/generate", json=payload) as answer:
                if answer.status != 200:
                    return Answer(answer.status, message=await answer.text())
                if not payload["stream"]:
                    return _parse(await answer.json())
                return await _read_stream(answer.content, came)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Lost(f"{error!r} for {payload}") from error

    async def _abort(self, rid: str, after: float) -> None:
        await asyncio.sleep(after)
        await self.post("/abort_request", {"rid": rid})

    async def _chain(
        self, mix: Mix, chain: Sequence[int], found: dict[int, Answer]
    ) -> None:
        """One request, or the turns of a session."""
        session: dict[str, Any] | None = None
        if mix.asks[chain[0]].session:
            _, opened = await self.post("/open_session", {"capacity_of_str_len": 9999})
            session = {"id": json.loads(opened), "rid": None}
        for index in chain:
            ask, rid = mix.asks[index], uuid.uuid4().hex
            await asyncio.sleep(ask.delay)
            found[index] = await self.ask(ask, session, rid)
            if session:
                session["rid"] = rid
        if session:
            await self.post("/close_session", {"session_id": session["id"]})

    async def _pause(self, pause: Pause) -> None:
        await asyncio.sleep(pause.at)
        async with self._pausing:
            try:
                await self.post("/pause_generation", {"mode": pause.mode})
                await asyncio.sleep(pause.seconds)
            finally:
                await self.post("/continue_generation", {})

    async def _flush_at(self, at: float) -> None:
        # It is refused while requests run, and that is fine.
        await asyncio.sleep(at)
        await self.post("/flush_cache")


def reference_ask(ask: Ask, said: Sequence[int] = ()) -> Ask:
    """The same request without anything that only a busy server sees.

    `said` are prompt and answers of the turns before. Two top log-probabilities tell
    a near tie.
    """
    return replace(
        ask,
        ids=(*said, *ask.ids),
        delay=0.0,
        stream=False,
        abort_after=0.0,
        disconnect_after=0.0,
        session=0,
        priority=0,
        return_logprob=True,
        top_logprobs_num=max(2, ask.top_logprobs_num),
        # Without it a request asks for no log-probability of its prompt.
        logprob_start_len=ask.logprob_start_len if ask.return_logprob else -1,
    )


async def run_alone(client: Client, mix: Mix, longest: int) -> list[Answer]:
    """The reference: one request after the other. Prompts above `longest` are left out."""
    answers: list[Answer] = []
    said: dict[int, tuple[int, ...]] = {}
    for ask in mix.asks:
        if len(ask.ids) > longest:
            answers.append(Answer(400))
            continue
        alone = reference_ask(ask, said.get(ask.session, ()) if ask.session else ())
        answer = await client.ask(alone)
        if answer.status != 200:
            raise Lost(f"the reference answered {answer} to {alone}")
        answers.append(answer)
        if ask.session:
            said[ask.session] = (*alone.ids, *answer.outputs[0].ids)
    return answers


async def _read_stream(content: aiohttp.StreamReader, came: list[Answer]) -> Answer:
    """Each part holds all that came before it."""
    async for line in content:
        if line.startswith(b"data: {"):
            part = json.loads(line[6:])
            if "error" in part:
                return Answer(500, came[-1].outputs if came else [], str(part["error"]))
            came.append(_parse(part))
    if not came:
        raise Lost("a stream ended without a part")
    return came[-1]


def _parse(raw: Any) -> Answer:
    """A stream has no other status than 200, so what was refused tells it in its end."""
    every = raw if isinstance(raw, list) else [raw]
    finish = every[0]["meta_info"]["finish_reason"] or {}
    return Answer(
        finish.get("status_code") or 200,
        [_output(one["output_ids"], one) for one in every],
        finish.get("message", ""),
    )


def _output(ids: list[int], raw: Mapping[str, Any]) -> Output:
    meta = raw["meta_info"]
    finish = meta["finish_reason"] or {}
    return Output(
        ids,
        raw["text"],
        finish.get("type", ""),
        finish.get("matched"),
        [_row(entry) for entry in meta.get("output_token_logprobs", ())],
        [_rows(rows) for rows in meta.get("output_top_logprobs", ())],
        [_row(entry) for entry in meta.get("input_token_logprobs", ())],
        [_rows(rows) for rows in meta.get("input_top_logprobs", ())],
        meta.get("num_retractions", 0),
        meta.get("cached_tokens", 0),
    )


def _rows(entries: Sequence[Sequence[Any]] | None) -> list[Row]:
    return [_row(entry) for entry in entries or ()]


def _row(entry: Sequence[Any]) -> Row:
    return (None if entry[0] is None else float(entry[0]), int(entry[1]))
