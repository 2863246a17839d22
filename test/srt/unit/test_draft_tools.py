"""What tests of speculation know of their drafts: which are right, and how many are accepted.

The GPU tests compare servers that all have these drafts. Only here is it seen that right
drafts are right, that wrong ones never are, and what counts follow.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import speculation, speculation_plain
from helpers.draft_oracle import DraftOracle
from helpers.gpu_checkpoints import beside, checkpoint
from helpers.request_set import Request, hf_reference
from helpers.teacher_forcing import forced_token

WIDTH = 4
# SGLang shows a corpus so many tokens at most.
SHOWN = 18


def serve(corpus: speculation.KnownCorpus, tokens: list[int], wanted: list[int]) -> int:
    """Verify until the reply is whole, as a server does, and count."""
    tokens, wanted = [*tokens, wanted[0]], wanted[1:]
    count = 0
    while wanted:
        drafts, _ = corpus.batch_get(["0"], [tokens[-SHOWN:]], [len(tokens)])
        assert len(drafts) == WIDTH and drafts[0] == tokens[-1]
        pairs = zip(drafts[1:].tolist(), wanted)
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        tokens += wanted[: right + 1]
        wanted = wanted[right + 1 :]
        count += 1
    return count


@pytest.mark.parametrize("from_file", [False, True], ids=["forced", "file"])
@pytest.mark.parametrize("right", ["all", "some", "none"])
def test_verifications_are_as_many_as_known(
    right: str, from_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(5)
    requests = []
    for length in (1, 2, 3, 17, 40, 133):
        prompt = [draw.randrange(256) for _ in range(length)]
        reply = [forced_token(length + i) for i in range(draw.randrange(2, 90))]
        if from_file:
            # Forced ones do not tell two requests apart.
            reply = [draw.randrange(256) for _ in reply]
        requests.append((prompt, reply))
    file = speculation.write_sequences(
        tmp_path / "known.json", [prompt + reply for prompt, reply in requests]
    )
    told = speculation.knowing(right, file if from_file else None)
    monkeypatch.setenv(speculation.CORPUS, told[speculation.CORPUS])
    # One corpus for all: what it drew for one request is nothing to the next.
    corpus = speculation.KnownCorpus(draft_token_num=WIDTH)
    for prompt, reply in requests:
        known = (right, len(prompt), len(reply), WIDTH)
        assert serve(corpus, prompt, reply) == speculation.known_verifications(*known)


def test_known_verifications_by_hand() -> None:
    count = speculation.known_verifications
    assert count("none", 9, 20, WIDTH) == 19
    assert count("all", 9, 21, WIDTH) == 5
    assert count("all", 9, 22, WIDTH) == 6
    assert 5 < count("some", 9, 21, WIDTH) < 20


def test_flags_say_what_a_corpus_is_told() -> None:
    flags = "--tp 2 --speculative-num-draft-tokens 8 --page-size 1"
    assert speculation.told(flags, speculation.knowing("some")) == ("some", 8)


KINDS = (
    "llama-2kv+shallow",
    pytest.param("mla-moe+shallow", marks=pytest.mark.long),
    pytest.param("mla-v3+shallow-mtp", marks=pytest.mark.long),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_target_drafts_for_itself(kind: str, tmp_path: Path) -> None:
    """Without its first token it still knows most of what follows; a stranger does not.

    That heads draft as their targets do is seen in `test_server_speculation.py`.
    """
    draw = random.Random(2)
    prompt = tuple(draw.randrange(256) for _ in range(60))
    target = checkpoint(tmp_path, kind, 0)
    (reply,) = hf_reference(target, [Request("one", prompt, 32)])
    models = (target, beside(tmp_path, kind, 0, "seed1"))
    own, other = (
        DraftOracle(m, WIDTH).verifications(prompt, reply.ids) for m in models
    )
    assert 31 / own > (WIDTH + 1) / 2 and 31 / other < 1.2


def test_checkpoints_by_words(tmp_path: Path) -> None:
    shallow = checkpoint(tmp_path, "llama-2kv+shallow", 0)
    assert checkpoint(tmp_path, "llama-2kv+shallow", 0) == shallow
    head = beside(tmp_path, "llama-2kv+shallow", 0, "eagle3")
    assert beside(tmp_path, "llama-2kv+shallow", 0, "eagle3") == head
    assert json.loads((head / "config.json").read_text())["norm_output"]
    plain = beside(tmp_path, "llama-2kv", 0, "eagle3")
    assert not json.loads((plain / "config.json").read_text())["norm_output"]
    other = beside(tmp_path, "llama-2kv", 0, "seed1")
    assert other == checkpoint(tmp_path, "llama-2kv", 1)
    with pytest.raises(ValueError, match="eagle2"):
        beside(tmp_path, "llama-2kv", 0, "eagle2")


def test_an_embedding_comes_out_of_its_norm_as_it_is(tmp_path: Path) -> None:
    """In 16 bit, too: a right MTP layer gets what the target's last layer gets."""
    from safetensors.torch import load_file

    weights = load_file(
        checkpoint(tmp_path, "mla-v3+shallow-mtp", 0) / "model.safetensors"
    )
    embedding = weights["model.embed_tokens.weight"].bfloat16().float()
    norm = weights["model.layers.3.enorm.weight"].bfloat16().float()
    scale = (embedding.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal((embedding * scale * norm).bfloat16().float(), embedding)


@pytest.mark.parametrize("verifies", [True, False])
def test_a_plain_verification_extends_by_its_drafts(verifies: bool) -> None:
    lens = torch.tensor([7, 30])
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: verifies),
        spec_info=SimpleNamespace(draft_token_num=WIDTH),
        seq_lens=lens,
    )
    seen: list[Any] = []
    speculation_plain.forward_extend(
        lambda *args: seen.append(args[5]), *"bqkvl", batch, True
    )
    assert batch.seq_lens is lens
    if not verifies:
        assert seen == [batch]
        return
    assert seen[0].extend_prefix_lens.tolist() == [7, 30]
    assert seen[0].extend_seq_lens.tolist() == [WIDTH, WIDTH]
    assert seen[0].seq_lens.tolist() == [7 + WIDTH, 30 + WIDTH]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
