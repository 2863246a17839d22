"""The head that `distil_draft.py` trains, and what `eval_draft.py` makes of its drafts.

Only this file catches a head that trains on other rows or steps than a server drafts by, and
a comparison that passes whatever is accepted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accepted_report import Drafted, accepted, faults, table
from decode_layouts import Layout
from distil_draft import (
    STEPS,
    Lessons,
    Trainer,
    blocks_of,
    head_vocab,
    new_head,
    places_of,
    schedule,
)
from draft_head import FEATURES, DraftHead, feature_layers, save_head
from eval_draft import drafted, parse
from head_oracle import agreeing, load_head, verifications
from real_text import chapters, split_chapters
from speculation_door import open_door

HIDDEN, WORDS = 16, 12
CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0},
    "vocab_size": WORDS,
}


def target_weights() -> dict[str, Tensor]:
    """The parts of a target that a new head takes."""
    torch.manual_seed(3)
    layer = "model.layers.5."
    shapes = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        f"{layer}self_attn.q_proj.weight": (32, HIDDEN),
        f"{layer}self_attn.k_proj.weight": (16, HIDDEN),
        f"{layer}self_attn.v_proj.weight": (16, HIDDEN),
        f"{layer}self_attn.o_proj.weight": (HIDDEN, 32),
        f"{layer}mlp.gate_proj.weight": (24, HIDDEN),
        f"{layer}mlp.up_proj.weight": (24, HIDDEN),
        f"{layer}mlp.down_proj.weight": (HIDDEN, 24),
        f"{layer}input_layernorm.weight": (HIDDEN,),
        f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
    }
    return {name: 0.5 * torch.randn(shape) for name, shape in shapes.items()}


def random_head() -> DraftHead:
    return new_head(CONFIG, target_weights(), torch.arange(WORDS)).eval()


@torch.no_grad()
def drafted_step_by_step(
    head: DraftHead, features: Tensor, words: Tensor, row: int, step: int
) -> Tensor:
    """As a server does: each step sees one sequence, the accepted tokens and its drafts."""
    hidden = head.fc(features[:, : row + 1])
    for done in range(1, step + 1):
        length = row + done
        out = head.midlayer(words[:, :length], hidden, [])
        hidden = torch.cat([hidden, out[:, -1:]], 1)
    return head.lm_head(head.norm(hidden[:, -1]))


def test_steps_of_all_rows_are_those_of_a_server() -> None:
    head, rows = random_head(), 7
    features = torch.randn(2, rows, FEATURES * HIDDEN)
    words = torch.randn(2, rows + STEPS - 1, HIDDEN)
    with torch.no_grad():
        found = head(features, words, STEPS)
    for step in range(1, STEPS + 1):
        for row in range(rows):
            wanted = drafted_step_by_step(head, features, words, row, step)
            assert torch.allclose(found[step - 1][:, row], wanted, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_new_head_has_the_last_layer_and_reads_the_last_features() -> None:
    head, weights = random_head(), target_weights()
    mlp = head.midlayer.mlp.down_proj.weight
    assert torch.equal(mlp, weights["model.layers.5.mlp.down_proj.weight"])
    assert head.midlayer.self_attn.q_proj.weight.shape == (32, 2 * HIDDEN)
    assert torch.allclose(head.fc.weight[:, 2 * HIDDEN :], torch.eye(HIDDEN), atol=0.1)
    assert feature_layers(30) == (2, 15, 27)


def lessons(blocks: int) -> tuple[Lessons, Tensor]:
    """Random texts, of whose tokens the target always says the next number."""
    torch.manual_seed(4)
    ids = torch.randint(WORDS, (blocks, 12))
    embedding = torch.randn(WORDS, HIDDEN)
    features = torch.randn(blocks, 12, FEATURES * HIDDEN).bfloat16()
    return Lessons(ids, (ids + 1) % WORDS, features), embedding


def test_a_head_learns_what_the_target_says_of_the_word_that_each_step_reads() -> None:
    """No other word of these texts tells it."""
    known, embedding = lessons(64)
    trainer = Trainer(random_head(), embedding, torch.arange(WORDS))
    assert trainer.right_shares(known)[0] < 0.3
    trainer.train(known.take(slice(8, None)), updates=150, batch=16, rate=1e-2)
    assert min(trainer.right_shares(known.take(slice(8)))) > 0.9


def test_words_that_the_head_lacks_are_never_right() -> None:
    known, embedding = lessons(8)
    vocab = torch.tensor([0, 1, 2])
    trainer = Trainer(new_head(CONFIG, target_weights(), vocab), embedding, vocab)
    missing = known._replace(said=torch.full_like(known.said, 7))
    assert trainer.right_shares(missing) == [0.0] * STEPS
    assert places_of(vocab, 5).tolist() == [0, 1, 2, -1, -1]


def test_the_head_keeps_the_most_frequent_words() -> None:
    said = torch.tensor([[5, 5, 9], [2, 2, 5]])
    assert head_vocab(said, 2, 10).tolist() == [2, 5]


def test_blocks_are_whole_and_mixed() -> None:
    texts = [list(range(25)), list(range(100, 107))]
    blocks = blocks_of(texts, 5)
    assert sorted(blocks) == [
        *(list(range(start, start + 5)) for start in range(0, 25, 5)),
        list(range(100, 105)),
    ]
    assert blocks == blocks_of(texts, 5) != sorted(blocks)


def test_held_out_chapters_are_not_trained_on() -> None:
    """Some of Python's chapters stand in others as a whole."""
    taught, held_out = split_chapters()
    whole = "\n".join(taught)
    assert not any(text in whole for text in held_out)
    assert set(taught) | set(held_out) < set(chapters())
    assert sum(map(len, taught)) > 2 * sum(map(len, held_out))


def test_the_rate_goes_up_then_down() -> None:
    rates = [schedule(update, 100) for update in range(100)]
    assert rates[0] < 0.2 and max(rates) > 0.9 and rates[-1] < 0.06


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_text("{}")
    vocab = torch.tensor([1, 4, 9])
    head = new_head(CONFIG, target_weights(), vocab)
    folder = save_head(tmp_path / "draft", target, head, vocab)
    found, words = load_head(folder)
    assert words.tolist() == [1, 4, 9]
    for name, weight in head.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)
    config = json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == 3 and config["num_hidden_layers"] == 1


def test_right_drafts_of_each_row() -> None:
    ids = [7, 8, 9, 10, 11]
    # Row 0 drafts for the tokens 9, 10 and 11.
    drafts = torch.tensor([[9, 10, 0, 5, 5], [10, 0, 0, 5, 5], [0, 0, 0, 5, 5]])
    assert agreeing(drafts, ids) == [2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "counts, wanted",
    [
        ([9, 0, 0, 0, 0, 9], 4),
        ([9, 3, 9, 9, 9, 9], 1),
        # 1 + 2 tokens, after which row 4 drafts.
        ([9, 2, 0, 0, 1, 9], 2),
    ],
)
def test_verifications_of_a_reply(counts: list[int], wanted: int) -> None:
    """A prompt of 2 tokens, whose first drafts are from row 1, and 5 new tokens."""
    assert verifications(counts, 2, 5) == wanted


# Of one GPU: two ranks, the default, and a CPU.
SHARED = ("cuda --tp 2", "cuda", "cpu --tp 2")
LAYOUTS = [Layout.parse(name) for name in ("tp", "2:a2a:q")]
IDS = list(range(65))


def served(steps: int, ids: list[int] = IDS) -> list[Drafted]:
    return [Drafted(ids, steps, 65 / steps if steps else 1.0)]


def test_tokens_of_a_verification() -> None:
    assert accepted(served(32)) == 2.0
    assert accepted(served(0)) == 1.0
    assert accepted([*served(32), *served(64)]) == pytest.approx(128 / 96)


OTHER = [*IDS[:-1], 0]


@pytest.mark.parametrize(
    "replies, told",
    [
        (served(32), ""),
        (served(33), "33 verifications, by torch 32; equal for 0 of 1 replies"),
        (served(64), "1.000 tokens of a verification"),
        (served(32, OTHER), "0 of 1 replies are equal"),
    ],
)
def test_faults_in_fp32(replies: list[Drafted], told: str) -> None:
    found = {"tp1": served(0), "tp": served(32), "2:a2a:q": replies}
    errors = "\n".join(faults(found, LAYOUTS, [32]))
    assert bool(errors) == bool(told) and told in errors


@pytest.mark.parametrize(
    "replies, told",
    [
        ([*served(32), *served(64, OTHER)], ""),
        (
            [*served(33), *served(31, OTHER)],
            "1.9394 tokens of a verification in replies",
        ),
        (served(32, OTHER) * 2, "0 of 2 replies are plain TP's, too few to compare"),
        (served(64) * 2, "1.000 tokens of a verification"),
    ],
    ids=["close", "far", "others", "hardly any"],
)
def test_faults_in_16_bit(replies: list[Drafted], told: str) -> None:
    """Only of replies that are plain TP's the accepted lengths are compared."""
    found = {"tp1": served(0) * 2, "tp": served(32) * 2, "2:a2a:q": replies}
    errors = "\n".join(faults(found, LAYOUTS, None))
    assert bool(errors) == bool(told) and told in errors


def test_a_row_has_what_replies_of_plain_tp_took() -> None:
    own = [*served(16), *served(64, OTHER)]
    found = {"tp1": served(0) * 2, "tp": served(32) * 2, "2:a2a:q": own}
    line = table(found, found["tp"]).splitlines()[-1]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:3] == ["1 of 2", "80"] and cells[-1] == "1: 4.0000, 2.0000"


def test_a_row_for_each_server() -> None:
    lines = table({"tp1": served(0), "tp": served(32)}).splitlines()
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells == ["tp", "1 of 1", "32", "2.0000", "2.0312"]


def test_options(tmp_path: Path) -> None:
    options = parse([str(tmp_path / "out.json"), str(tmp_path), "--device", "cpu"])
    assert [layout.name for layout in options.layouts] == ["tp", "2:a2a:q"]
    assert options.draft == tmp_path / "draft" and options.size.prompts == 16


def test_a_reply_without_speculation_has_no_verifications() -> None:
    meta: dict[str, Any] = {"spec_verify_ct": 3, "spec_accept_length": 2.0}
    assert drafted({"output_ids": [1, 2], "meta_info": meta}) == ([1, 2], 3, 2.0)
    assert drafted({"output_ids": [1, 2], "meta_info": {}}) == ([1, 2], 0, 1.0)


def test_more_ranks_than_gpus_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = [str(tmp_path / "out.json"), str(tmp_path), "--device"]
    shared = [parse([*asked, *more.split()]).shared_by for more in SHARED]
    assert shared == [2, 0, 0]
    env = open_door(tmp_path / "door", "cuda", 2)
    assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"
    folder = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    assert "helpers.shared_gpus" in (folder / "speculation_door.py").read_text()
    alone = open_door(tmp_path / "alone", "cuda")
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in alone


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
