"""What `eval_accuracy.py` makes of answers, and the checkpoint that it serves.

Only this file catches a comparison that passes whatever the servers say, and a head group
that changes the model.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from accuracy_report import Answers, faults, mean_difference, perplexity, table
from decode_layouts import Layout
from eval_accuracy import parse, server_flags
from real_text import draw_sample
from trained_model import GROUP, add_zero_heads, rotary_halves, weight_name

FIRST = Answers([-1.0, -2.0, -3.0], [[1, 2], [3, 4]])
LAYOUTS = [Layout.parse(name) for name in ("tp", "2:a2a:q")]


def moved(by: float, replies: list[list[int]] | None = None) -> Answers:
    return Answers([x + by for x in FIRST.read], replies or FIRST.replies)


def test_measures() -> None:
    assert perplexity([math.log(0.25), math.log(0.25)]) == pytest.approx(4.0)
    assert mean_difference([-1.0, -2.0], [-1.5, -1.5]) == pytest.approx(0.5)
    with pytest.raises(ValueError):
        mean_difference([-1.0], [-1.0, -2.0])


def test_a_row_for_each_server() -> None:
    found = {"tp1": FIRST, "tp": moved(0.5, [[1, 2], [3, 5]])}
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table(found).splitlines()
    ]
    assert rows[2] == ["tp1", "7.3891", "0", "2 of 2"]
    assert rows[3] == ["tp", "4.4817", "0.5", "1 of 2"]


@pytest.mark.parametrize(
    "gap, fault",
    [(0.14, False), (0.16, True), (math.nan, True)],
)
def test_a_server_further_off_than_plain_tp_is_a_fault(gap: float, fault: bool) -> None:
    found = {"tp1": FIRST, "tp": moved(0.1), "2:a2a:q": moved(gap)}
    assert bool(faults(found, LAYOUTS)) == fault


def test_without_plain_tp_only_fp32_passes() -> None:
    for gap, fault in ((1e-5, False), (1e-3, True)):
        assert bool(faults({"tp1": FIRST, "2:a2a:q": moved(gap)}, LAYOUTS)) == fault


def test_flags_of_servers(tmp_path: Path) -> None:
    options = parse([str(tmp_path / "out.json"), "--device", "cuda", "--tp", "4"])
    first = " ".join(server_flags(options, None))
    assert first.startswith("--tp 1 --attention-backend fa3") and "dcp" not in first
    wide = Layout.parse("2:symm_a2a:q@triton")
    flags = " ".join(server_flags(options, wide))
    assert flags.startswith("--tp 4 --attention-backend triton")
    assert flags.endswith(
        "--dcp-size 2 --dcp-comm-backend symm_a2a --dcp-replicate-q-proj"
    )


class Words:
    """A tokenizer of one id a word."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_same_text_each_time() -> None:
    def draw(seed: int = 1) -> list[list[int]]:
        size = {"texts": 2, "text_tokens": 70, "prompts": 6, "prompt_tokens": (5, 40)}
        sample = draw_sample(Words(), seed=seed, **size)  # type: ignore[arg-type]
        assert [len(ids) for ids in sample.texts] == [70, 70]
        assert sample.tokens_read == 138
        assert [len(ids) for ids in sample.prompts] == [5, 40, 5, 40, 5, 40]
        return sample.prompts

    assert draw() == draw() != draw(seed=2)


def test_names() -> None:
    assert (
        weight_name("blk.7.attn_k.weight") == "model.layers.7.self_attn.k_proj.weight"
    )
    assert weight_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError):
        weight_name("blk.7.attn_sinks.weight")


def test_rows_that_rotate_together_are_half_a_head_apart() -> None:
    heads, dim, hidden = 3, 8, 5
    ours = torch.randn(heads * dim, hidden)
    # As llama.cpp's converter writes them.
    halves = ours.view(heads, 2, dim // 2, hidden)
    theirs = halves.transpose(1, 2).reshape(heads * dim, hidden)
    assert torch.equal(rotary_halves(theirs, dim), ours)


def test_added_heads_leave_the_output_as_it_is() -> None:
    dim, kv_heads, hidden = 4, 2, 16
    rows = {"q": kv_heads * GROUP * dim, "k": kv_heads * dim, "v": kv_heads * dim}
    weights = {
        f"model.layers.0.self_attn.{part}_proj.weight": torch.randn(count, hidden)
        for part, count in rows.items()
    }
    weights["model.layers.0.self_attn.o_proj.weight"] = torch.randn(hidden, rows["q"])
    before = attend(weights, dim)
    add_zero_heads(weights, dim, 1)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (12, hidden)
    assert torch.allclose(attend(weights, dim), before, atol=1e-5)


def attend(weights: dict[str, torch.Tensor], dim: int) -> torch.Tensor:
    """Causal attention of seven tokens, without rotary embedding."""
    hidden = torch.linspace(-1, 1, 7 * 16).view(7, 16)
    q, k, v = (
        (hidden @ weights[f"model.layers.0.self_attn.{part}_proj.weight"].T)
        .view(7, -1, dim)
        .transpose(0, 1)
        for part in "qkv"
    )
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(GROUP, 0), v.repeat_interleave(GROUP, 0), is_causal=True
    )
    projection = weights["model.layers.0.self_attn.o_proj.weight"]
    return out.transpose(0, 1).reshape(7, -1) @ projection.T


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
