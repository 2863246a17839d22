"""How many verifications replies take with a head's drafts, by torch and transformers.

One pass over prompt and reply tells it: where a head's drafts agree with the reply, a server
that drafts step by step would have read the same words. There is no cache and no rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from draft_head import DraftHead, feature_layers
from real_text import Ids


def load_head(folder: Path) -> tuple[DraftHead, Tensor]:
    """Read what `save_head` wrote: the head, and the target's id of each of its words."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    offsets = weights.pop("d2t")
    head = DraftHead(config, len(offsets))
    head.load_state_dict(weights)
    return head.eval(), offsets + torch.arange(len(offsets))


def agreeing(drafts: Tensor, ids: Ids) -> list[int]:
    """Count, for each row, the drafts before the first that is not in `ids`.

    `drafts` [steps, rows] has in row i what is drafted for tokens i + 2, i + 3, ...
    """
    steps, rows = drafts.shape
    counts = []
    for row in range(rows):
        wanted = ids[row + 2 : row + 2 + steps]
        pairs = zip(drafts[:, row].tolist(), wanted)
        wrong = (i for i, (drafted, word) in enumerate(pairs) if drafted != word)
        counts.append(next(wrong, len(wanted)))
    return counts


def verifications(counts: Sequence[int], prompt_tokens: int, new_tokens: int) -> int:
    """Count those of a reply whose rows have `counts` right drafts.

    The prefill gives the first token. A verification gives its right drafts and one more.
    """
    done, count = 1, 0
    while done < new_tokens:
        # Its last two tokens are those that the row before it reads.
        done += 1 + counts[prompt_tokens + done - 2]
        count += 1
    return count


class HeadOracle:
    """A target and a head, in float32 on the CPU."""

    def __init__(self, target: Path, draft: Path, steps: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            target, dtype=torch.float32
        ).eval()
        self._layers = feature_layers(self._model.config.num_hidden_layers)
        self._head, self._vocab = load_head(draft)
        self._steps = steps

    def verifications(self, prompt: Ids, reply: Ids) -> int:
        ids = [*prompt, *reply]
        return verifications(agreeing(self._drafts(ids), ids), len(prompt), len(reply))

    @torch.inference_mode()
    def says(self, prompt: Ids, reply: Ids) -> Ids:
        """Return the target's greedy token at each place of the reply."""
        ids = torch.tensor([[*prompt, *reply]])
        logits = self._model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        return [int(word) for word in logits.argmax(-1)]

    @torch.inference_mode()
    def _drafts(self, ids: Ids) -> Tensor:
        """Return the greedy drafts of each row, [steps, rows], as ids of the target."""
        states = self._model.model(
            torch.tensor([ids]), output_hidden_states=True, use_cache=False
        ).hidden_states
        features = torch.cat([states[layer] for layer in self._layers], -1)
        # Rows at the end read words behind it. No verification counts what they draft.
        padded = torch.tensor([[*ids[1:], *[0] * self._steps]])
        words = self._model.get_input_embeddings()(padded)
        logits = self._head(features, words, self._steps)
        return self._vocab[torch.stack([one[0].argmax(-1) for one in logits])]
