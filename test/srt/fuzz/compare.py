"""Judges answers by those of a reference that got each request alone. Pure.

In fp32 a log-probability may differ by `LOGPROB_TOLERANCE`. A token may differ only where
the reference holds both candidates for equal within it; what follows cannot be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fuzz.client import Answer, Output, Row
from fuzz.mixes import Ask, Mix
from helpers.request_set import LOGPROB_TOLERANCE


@dataclass
class Counts:
    """What was compared, over many mixes."""

    requests: int = 0
    outputs: int = 0
    tokens: int = 0
    logprobs: int = 0
    ties: int = 0
    forgotten: int = 0
    cut: int = 0
    refused: int = 0
    retracted: int = 0
    largest: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.outputs} outputs, {self.tokens} tokens and "
            f"{self.logprobs} log-probabilities compared (largest difference "
            f"{self.largest:.1e}); {self.ties} near ties, {self.cut} cut short, "
            f"{self.refused} refused, {self.retracted} retracted, {self.forgotten} of "
            "them with penalties that SGLang then forgets"
        )


class Judge:
    """Collects the faults of mixes, and counts.

    `longest` is the longest prompt that the server takes. Its pool may cut an answer that
    would end beyond. With an infinite `tolerance` no two tokens are near ties.
    """

    def __init__(self, longest: int, tolerance: float = LOGPROB_TOLERANCE) -> None:
        self.counts = Counts()
        self._longest = longest
        self._tolerance = tolerance

    def faults(
        self,
        mix: Mix,
        got: Sequence[Answer],
        want: Sequence[Answer],
        cut_all: bool = False,
    ) -> list[str]:
        """One line for each request that differs.

        With `cut_all` another mix may have aborted any request.
        """
        found = []
        parted: set[int] = set()
        said: dict[int, int] = {}
        for index, ask in enumerate(mix.asks):
            self.counts.requests += 1
            if ask.session in parted:
                continue
            # A session's prompt holds what was said before.
            length = len(ask.ids) + said.get(ask.session, 0)
            cut = ask.may_end_early or mix.aborts_all or cut_all
            ties = self.counts.ties
            fault = self._answer(ask, got[index], want[index], length, cut)
            if fault:
                found.append(f"request {index}: {fault}; {ask}")
            if ask.session:
                said[ask.session] = length + ask.max_new_tokens
                if fault or cut or self.counts.ties > ties:
                    parted.add(ask.session)
        return found

    def _answer(
        self, ask: Ask, got: Answer, want: Answer, length: int, cut: bool
    ) -> str:
        if want.status == 400:
            self.counts.refused += 1
            early = cut and (got.status == 0 or "bort" in got.message)
            if got.status == 400 or early:
                return ""
            return f"status {got.status} {got.message[:200]}, expected 400"
        ended = cut and (got.status == 0 or "bort" in got.message)
        if got.status != 200 and not ended:
            return f"status {got.status}: {got.message[:300]}"
        if got.status == 400 and ask.has_grammar:
            return self._aborted_at_its_grammar(got)
        if got.status == 200 and len(got.outputs) != ask.n:
            return f"{len(got.outputs)} outputs, expected {ask.n}"
        ends_in_pool = length + ask.max_new_tokens > self._longest
        for a, b in zip(got.outputs, want.outputs):
            fault = self._output(ask, a, b, cut, ends_in_pool)
            if fault:
                return fault
        return ""

    def _aborted_at_its_grammar(self, got: Answer) -> str:
        """What was aborted while its grammar was compiled has nothing to compare.

        SGLang puts the prompt [0] in place of its own, takes the grammar away, and lets
        one prefill end it. A stream shows the token of that prefill.
        """
        self.counts.outputs += len(got.outputs)
        self.counts.cut += len(got.outputs)
        if any(len(o.ids) > 1 or o.finish != "abort" for o in got.outputs):
            return f"{got.outputs} after an abort at its grammar, expected one token"
        return ""

    def _output(
        self, ask: Ask, got: Output, want: Output, cut: bool, ends_in_pool: bool
    ) -> str:
        self.counts.outputs += 1
        self.counts.retracted += got.retractions > 0
        if got.finish == "abort" and not cut:
            return "aborted, though no one asked for it"
        if got.retractions and ask.counts_its_tokens:
            # SGLang counts tokens anew after a retraction.
            self.counts.forgotten += 1
            return ""
        fault, tie = self._tokens(got, want)
        if fault or tie:
            return fault
        fault = self._input(ask, got, want)
        if fault:
            return fault
        if cut and got.finish in ("", "abort"):
            self.counts.cut += 1
            return ""
        if ends_in_pool and got.finish == "length" and len(got.ids) < len(want.ids):
            self.counts.cut += 1
            return "" if got.ids else "no token at all"
        if not got.finish:
            return "the answer has no end"
        return _ends(ask, got, want)

    def _tokens(self, got: Output, want: Output) -> tuple[str, bool]:
        """The first fault, and whether a near tie parted the two."""
        for at, (a, b) in enumerate(zip(got.ids, want.ids)):
            if a != b and self._is_tie(a, want, at):
                self.counts.ties += 1
                return "", True
            if a != b:
                return f"new token {at}: id {a}, expected {b}", False
            self.counts.tokens += 1
            if at < len(got.logprobs):
                fault = self._row(got.logprobs[at], want.logprobs[at])
                if fault:
                    return f"new token {at}: {fault}", False
            if at < len(got.top):
                fault = self._top(got.top[at], want.top[at])
                if fault:
                    return f"new token {at}: {fault}", False
        return "", False

    def _is_tie(self, token: int, want: Output, at: int) -> bool:
        if math.isinf(self._tolerance):
            return False
        chosen = want.logprobs[at][0]
        for logprob, other in want.top[at]:
            if other == token and logprob is not None and chosen is not None:
                return abs(logprob - chosen) < self._tolerance
        return False

    def _input(self, ask: Ask, got: Output, want: Output) -> str:
        """Log-probabilities of the prompt."""
        if not ask.return_logprob or not (got.ids or got.finish == "length"):
            return ""
        if ask.logprob_start_len < 0 or ask.session:
            return ""
        if len(got.input_logprobs) != len(want.input_logprobs):
            return (
                f"{len(got.input_logprobs)} log-probabilities of the prompt, expected "
                f"{len(want.input_logprobs)}"
            )
        for at, (a, b) in enumerate(zip(got.input_logprobs, want.input_logprobs)):
            fault = self._row(a, b)
            if fault:
                return f"prompt token {at}: {fault}"
        for at, (top, other) in enumerate(zip(got.input_top, want.input_top)):
            fault = self._top(top, other)
            if fault:
                return f"prompt token {at}: {fault}"
        return ""

    def _row(self, got: Row, want: Row) -> str:
        if got[1] != want[1]:
            return f"log-probability of id {got[1]}, expected id {want[1]}"
        if got[0] is None or want[0] is None:
            return "" if got[0] == want[0] else f"log-probability {got[0]}, {want[0]}"
        self.counts.logprobs += 1
        gap = abs(got[0] - want[0])
        self.counts.largest = max(self.counts.largest, gap)
        # Written so that a NaN is a fault too.
        if gap < self._tolerance:
            return ""
        return f"log-probability {got[0]:.5f}, expected {want[0]:.5f}"

    def _top(self, got: Sequence[Row], want: Sequence[Row]) -> str:
        """Near ties may change places, so values are compared by rank and by id."""
        known = {token: logprob for logprob, token in want}
        for (a, token), (b, other) in zip(got, want):
            pairs = [(a, b, other)]
            if token in known:
                pairs.append((a, known[token], token))
            for left, right, which in pairs:
                fault = self._row((left, which), (right, which))
                if fault:
                    return f"top: {fault}"
        return ""


def _ends(ask: Ask, got: Output, want: Output) -> str:
    for name in ("ids", "text", "finish", "matched"):
        a, b = getattr(got, name), getattr(want, name)
        if a != b:
            return f"{name} {a!r}, expected {b!r}"
    if ask.return_logprob and len(got.logprobs) != len(got.ids):
        return f"{len(got.logprobs)} log-probabilities for {len(got.ids)} tokens"
    return ""
