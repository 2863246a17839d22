"""Plugins of servers that speculate, with drafts that a test knows.

DCP refuses all algorithms on CPUs. The plugin allows those that it is told to, in the
processes of one test. It can also take the place of NGRAM's corpus, so that a test knows
which drafts are right: all, none, or some of them.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from helpers.doors import with_door
from helpers.servers import plugin_folder
from helpers.teacher_forcing import PLUGIN, forced_token

# Environment of a server: its algorithms on a CPU, and what its corpus knows, as JSON.
SERVED = "SGLANG_DCP_TEST_SPECULATES"
CORPUS = "SGLANG_DCP_TEST_CORPUS"

DOOR = """
def load():
    from helpers import speculation

    speculation.open_door()
    speculation.install()
"""


class KnownCorpus:
    """Stands in for SGLang's `NgramCorpus`: it knows what comes next, and how to err.

    `right` says how many drafts after the last known token are right: all, none, or a
    number that depends on the position (`some`). The others are wrong. What is right
    stands in a file of whole sequences, or is the forced token of its position. So each
    request has as many verifications as `known_verifications` says, if SGLang tells the
    right length.

    In a `star`, as SGLang's corpus gives it where it knows little, all drafts are
    children of the root. A DCP server must make a chain of it.
    """

    def __init__(self, *, draft_token_num: int, **ignored: Any) -> None:
        known = json.loads(os.environ[CORPUS])
        file = known.get("file")
        self._sequences = json.loads(Path(file).read_text()) if file else None
        self._right: str = known["right"]
        self._star: bool = known["star"]
        self._width = draft_token_num
        self._draw = random.Random(3)

    def batch_get(
        self, req_ids: list[str], batch_tokens: list[list[int]], total_lens: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return drafts [requests x width] and their tree masks, flat int64 each."""
        drafts = [
            token
            for tokens, length in zip(batch_tokens, total_lens)
            for token in self._draft(tokens, length)
        ]
        mask = np.tri(self._width, dtype=np.int64)
        if self._star:
            mask = np.eye(self._width, dtype=np.int64)
            mask[:, 0] = 1
        return np.array(drafts, dtype=np.int64), np.tile(mask.flatten(), len(req_ids))

    def _draft(self, tokens: list[int], length: int) -> list[int]:
        count = self._width - 1
        known = self._continuation(tokens, length)[:count]
        right = _right_drafts(self._right, length, count)
        wrong = [self._other_than(token) for token in known[right:]]
        # Behind what is known, the request has ended.
        more = [self._other_than(0) for _ in range(count - len(known))]
        return [tokens[-1], *known[:right], *wrong, *more]

    def _other_than(self, token: int) -> int:
        drawn = self._draw.randrange(255)
        return drawn + (drawn >= token)

    def _continuation(self, tokens: list[int], length: int) -> list[int]:
        if self._sequences is None:
            return [int(forced_token(length + i)) for i in range(self._width)]
        for whole in self._sequences:
            if whole[length - len(tokens) : length] == tokens:
                return list(whole[length:])
        return []

    def batch_put(self, batch_tokens: Any) -> None: ...

    def synchronize(self) -> None: ...

    def reset(self) -> None: ...

    def erase_match_state(self, req_ids: Any) -> None: ...


def _right_drafts(right: str, length: int, count: int) -> int:
    """How many of `count` drafts after `length` tokens are right."""
    # The same for every server, and for each position another number.
    some = random.Random(length).randrange(count + 1)
    return {"all": count, "none": 0, "some": some}[right]


def known_verifications(
    right: str, prompt_tokens: int, new_tokens: int, width: int
) -> int:
    """Count those of a request with `KnownCorpus`: the prefill gives the first token."""
    done, count = 1, 0
    while done < new_tokens:
        done += 1 + _right_drafts(right, prompt_tokens + done, width - 1)
        count += 1
    return count


def open_door() -> None:
    """Let CPU servers of this process start with the algorithms that it names.

    A server without DCP names none.
    """
    from sglang_dcp.support import speculation

    served = tuple(os.environ.get(SERVED, "").split(","))
    speculation.SERVED_ON_CPU = served  # type: ignore[misc]


def install() -> None:
    """Put kernels for a CPU in place, and the known corpus where there is one."""
    import torch

    if not torch.accelerator.is_available():
        from helpers import speculation_cpu, speculation_plain

        speculation_cpu.install()
        speculation_plain.install()
    if CORPUS in os.environ:
        from sglang.srt.speculative.cpp_ngram import ngram_corpus

        ngram_corpus.NgramCorpus = KnownCorpus  # type: ignore[misc, assignment]


def speculating(
    folder: Path, *served: str, door: Optional[str] = None
) -> dict[str, str]:
    """Environment of a CPU server that may speculate by the algorithms `served`.

    `door` is another one that its plugin opens.
    """
    source = with_door(DOOR, door) if door else DOOR
    env = plugin_folder(folder, "speculation_door", source)
    # Nothing here is worth a compiler.
    return {**env, SERVED: ",".join(served), "TORCHDYNAMO_DISABLE": "1"}


def knowing(
    right: str, file: Path | None = None, *, star: bool = True
) -> Mapping[str, str]:
    """Environment in which NGRAM knows the sequences of `file`, or the forced tokens."""
    known = {"right": right, "star": star, "file": str(file) if file else None}
    return {CORPUS: json.dumps(known)}


def told(flags: str, env: Mapping[str, str]) -> tuple[str, int]:
    """Return what a server's corpus is told: which drafts are right, and the width."""
    words = flags.split()
    width = words[words.index("--speculative-num-draft-tokens") + 1]
    return json.loads(env[CORPUS])["right"], int(width)


def write_sequences(file: Path, sequences: Sequence[Sequence[int]]) -> Path:
    """Write whole sequences, prompt and reply, for `knowing`."""
    file.write_text(json.dumps([list(sequence) for sequence in sequences]))
    return file


# For servers with forced tokens: a verification predicts them as well. Its
# log-probabilities stay those that the model gave to them.
_FORCED_VERIFICATION = """

def forced_verification(sample, verify_input, batch, logits_output, *args, **kwargs):
    given = logits_output.next_token_logits
    forced = forced_token(verify_input.positions.long() + 1)
    logits = given.new_zeros(given.shape).scatter_(1, forced[:, None], 1.0)
    logits_output.next_token_logits = logits
    result = sample(verify_input, batch, logits_output, *args, **kwargs)
    logits_output.next_token_logits = given
    return result


def load():
    load_forced()
    from helpers import speculation
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    speculation.install()
    HookRegistry.register(
        "sglang.srt.speculative.eagle_utils.eagle_sample",
        forced_verification,
        HookType.AROUND,
    )
"""

FORCED = PLUGIN.replace("def load():", "def load_forced():") + _FORCED_VERIFICATION
