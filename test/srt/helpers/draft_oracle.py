"""How many verifications a reply takes when a plain model drafts, by transformers.

SGLang shows a STANDALONE draft each prompt without its first token: as for EAGLE, position
p holds the token of position p + 1. So even the target itself is not always right. This
walks the same way with another implementation, which has no cache and no ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class DraftOracle:
    """The greedy drafts of one checkpoint, float32 on the CPU."""

    def __init__(self, checkpoint: Path, width: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._width = width

    def verifications(self, prompt: Sequence[int], reply: Sequence[int]) -> int:
        """Count those that produce `reply` after its first token, of the prefill.

        Each one takes the drafts that agree with the reply, and one token more.
        """
        done, count = 1, 0
        while done < len(reply):
            drafts = self._draft([*prompt, *reply[:done]][1:])
            done += 1 + _agreeing(drafts, reply[done:])
            count += 1
        return count

    @torch.inference_mode()
    def _draft(self, tokens: list[int]) -> list[int]:
        start = len(tokens)
        while len(tokens) < start + self._width - 1:
            logits = self._model(input_ids=torch.tensor([tokens])).logits
            tokens = [*tokens, int(logits[0, -1].argmax())]
        return tokens[start:]


def _agreeing(drafts: Sequence[int], wanted: Sequence[int]) -> int:
    pairs = list(zip(drafts, wanted))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
