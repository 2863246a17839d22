"""Plugins of servers that speculate: a door in the refusal, and drafts that a test knows.

DCP refuses speculation at start until GPU servers have shown it right. The plugin opens
that door in the processes of one test. It can also take the place of NGRAM's corpus, so
that a test knows which drafts are right: all, none, or some of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.servers import plugin_folder

# Environment of a server: what the corpus knows, as JSON.
CORPUS = "SGLANG_DCP_TEST_CORPUS"

_PLUGIN = """
def load():
    from helpers import speculation

    speculation.open_door({served!r})
    speculation.install({cpu!r})
"""


class KnownCorpus:
    """Stands in for SGLang's `NgramCorpus`: it knows whole sequences, and how to err.

    `right` says how many drafts after the last known token are right: all, none, or a
    number that depends on the position (`some`). The others are random.
    """

    def __init__(self, *, draft_token_num: int, **ignored: Any) -> None:
        import os

        known = json.loads(Path(os.environ[CORPUS]).read_text())
        self._sequences: list[list[int]] = known["sequences"]
        self._right: str = known["right"]
        self._width = draft_token_num
        self._draw = random.Random(3)

    def batch_get(
        self, req_ids: list[str], batch_tokens: list[list[int]], total_lens: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Drafts [requests x width], and the tree masks of what SGLang's corpus gives.

        As there, drafts that are not known are children of the root. Ours stand behind
        it, and a chain must be made of them.
        """
        drafts = [
            token
            for tokens, length in zip(batch_tokens, total_lens)
            for token in self._draft(tokens, length)
        ]
        mask = np.eye(self._width, dtype=np.int64)
        mask[:, 0] = 1
        return np.array(drafts, dtype=np.int64), np.tile(mask.flatten(), len(req_ids))

    def _draft(self, tokens: list[int], length: int) -> list[int]:
        count = self._width - 1
        right = {"all": count, "none": 0, "some": length % (count + 1)}[self._right]
        known = self._continuation(tokens, length)[:right]
        more = [self._draw.randrange(256) for _ in range(count - len(known))]
        return [tokens[-1], *known, *more]

    def _continuation(self, tokens: list[int], length: int) -> list[int]:
        for whole in self._sequences:
            if whole[length - len(tokens) : length] == tokens:
                return whole[length:]
        return []

    def batch_put(self, batch_tokens: Any) -> None: ...

    def synchronize(self) -> None: ...

    def reset(self) -> None: ...

    def erase_match_state(self, req_ids: Any) -> None: ...


def open_door(served: Sequence[str]) -> None:
    """Let servers of this process start with these algorithms."""
    from sglang_dcp.support import speculation

    speculation.SERVED = tuple(served)  # type: ignore[misc]


def install(cpu: bool) -> None:
    """Put kernels for a CPU in place, and the known corpus where one is named."""
    import os

    if cpu:
        from helpers import speculation_cpu

        speculation_cpu.install()
    if CORPUS in os.environ:
        from sglang.srt.speculative.cpp_ngram import ngram_corpus

        ngram_corpus.NgramCorpus = KnownCorpus  # type: ignore[misc, assignment]


def speculating(folder: Path, *served: str, cpu: bool = True) -> dict[str, str]:
    """Environment of a server that may speculate by the algorithms `served`."""
    folder.mkdir(exist_ok=True)
    env = plugin_folder(
        folder, "speculation_door", _PLUGIN.format(served=served, cpu=cpu)
    )
    # Nothing here is worth a compiler.
    return {**env, "TORCHDYNAMO_DISABLE": "1"} if cpu else env


def knowing(
    folder: Path, sequences: Sequence[Sequence[int]], right: str
) -> dict[str, str]:
    """Environment in which NGRAM knows these sequences of prompt and reply."""
    file = folder / f"corpus-{right}.json"
    whole = [list(sequence) for sequence in sequences]
    file.write_text(json.dumps({"sequences": whole, "right": right}))
    return {CORPUS: str(file)}
