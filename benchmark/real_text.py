"""Long real texts that every Python installation holds: the Python language reference.

`pydoc_data.topics` has it as plain text, 79 chapters and some 110,000 tokens. The same
Python gives the same texts, and `fingerprint` says whether two machines read the same.
"""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Ids = list[int]
# Shorter ones, such as those of a frame, stand in several chapters.
LONG_LINE = 50


@dataclass(frozen=True)
class Sample:
    """What a server is asked: token ids to read, and prompts to continue.

    `fingerprint` names the Python release and the hash of all ids.
    """

    texts: list[Ids]
    prompts: list[Ids]
    fingerprint: str

    @property
    def tokens_read(self) -> int:
        """Tokens that get a log-probability: all but the first of each text."""
        return sum(len(ids) - 1 for ids in self.texts)


def chapters() -> list[str]:
    """The texts, the longest first."""
    from pydoc_data.topics import topics

    return sorted(topics.values(), key=lambda text: (-len(text), text))


def split_chapters() -> tuple[list[str], list[str]]:
    """Texts to train on, and every fourth chapter, which is held out; the longest first.

    Some chapters stand in others too. None to train on has a longer line of one held out.
    """
    found = list(dict.fromkeys(chapters()))
    held_out = found[3::4]
    lines = set().union(*map(_long_lines, held_out))
    return [text for text in found if not lines & _long_lines(text)], held_out


def _long_lines(text: str) -> set[str]:
    return {line for line in text.splitlines() if len(line) > LONG_LINE}


def draw_sample(
    tokenizer: Any,
    *,
    texts: int,
    text_tokens: int,
    prompts: int,
    prompt_tokens: Sequence[int],
    seed: int = 1,
    of: Sequence[str] | None = None,
) -> Sample:
    """At most `text_tokens` ids of each of the longest chapters, and prompts cut from any.

    `of` are the chapters, by default all.

    Prompts take the lengths of `prompt_tokens` in turn. Every fourth begins where its
    chapter does, so some begin with what was read before, and hit the radix cache.

    Raises
    ------
    ValueError
        No chapter is longer than a prompt.
    """
    # Longer than the model's context is no fault here: they are cut.
    found = [tokenizer(text, verbose=False)["input_ids"] for text in of or chapters()]
    read = [ids[:text_tokens] for ids in found[:texts]]
    draw = random.Random(seed)
    cut = []
    for index in range(prompts):
        length = prompt_tokens[index % len(prompt_tokens)]
        long_enough = [ids for ids in found if len(ids) > length]
        if not long_enough:
            raise ValueError(f"no chapter has more than {length} tokens")
        source = draw.choice(long_enough)
        start = 0 if index % 4 == 0 else draw.randrange(len(source) - length)
        cut.append(source[start : start + length])
    digest = hashlib.sha256(repr((read, cut)).encode()).hexdigest()[:12]
    return Sample(read, cut, f"Python {platform.python_version()}, {digest}")
