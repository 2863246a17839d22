"""Tiny checkpoints: same bytes for a seed, loadable, byte tokenizer, decided logits."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.request_set import build_requests, hf_reference
from sglang_dcp.demo.tiny_model import (
    CONTEXT_LENGTH,
    KINDS,
    MARKER,
    VOCAB_SIZE,
    make_tiny_model,
)

# Kind and folder of a model.
Made = tuple[str, Path]
TEXT = "Position 7 lives on rank 1.\n\tGr\u00fc\u00dfe \u2192 \U0001f600"


@pytest.fixture(scope="module", params=sorted(KINDS))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    kind = request.param
    return kind, make_tiny_model(tmp_path_factory.mktemp("model") / kind, kind)


def digests(path: Path) -> dict[str, str]:
    files = sorted(p for p in path.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_gives_same_bytes(made: Made, tmp_path: Path) -> None:
    kind, path = made
    assert digests(make_tiny_model(tmp_path / "again", kind)) == digests(path)
    other = digests(make_tiny_model(tmp_path / "other", kind, seed=1))
    assert other["model.safetensors"] != digests(path)["model.safetensors"]


def test_config_round_trip(made: Made) -> None:
    kind, path = made
    config = AutoConfig.from_pretrained(path)
    assert config.architectures == [KINDS[kind].architecture]
    assert config.max_position_embeddings == CONTEXT_LENGTH
    assert config.vocab_size == VOCAB_SIZE
    for name, value in {**KINDS[kind].sizes, **KINDS[kind].extra}.items():
        assert getattr(config, name) == value, name


def test_model_loads_whole(made: Made) -> None:
    _, path = made
    # A pair with this flag, which its type does not say.
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_logits_are_decided(made: Made) -> None:
    """Flat logits would let a wrong attention pick the right token."""
    _, path = made
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([build_requests()[5].ids])
    with torch.inference_mode():
        logits = model(ids).logits[0]
    top = logits.topk(2).values
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert (top[:, 0] - top[:, 1]).median() > 0.1
    assert entropy.median() < 0.8 * torch.tensor(float(VOCAB_SIZE)).log()
    assert set(logits.argmax(-1).tolist()) <= set(range(0x20, 0x7F))


def test_answer_depends_on_a_far_token(made: Made) -> None:
    """One changed token 300 positions back must show, or attention is not tested."""
    _, path = made
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([build_requests()[5].ids])
    changed = ids.clone()
    changed[0, ids.shape[1] - 300] ^= 1
    with torch.inference_mode():
        gap = model(ids).logits[0, -1] - model(changed).logits[0, -1]
    assert gap.abs().max() > 1e-2


def test_ids_are_bytes(made: Made) -> None:
    _, path = made
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == VOCAB_SIZE
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    chat = [{"role": "user", "content": "Hi"}]
    shown = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert shown == "<|user|>Hi<|eos|><|assistant|>"


def test_finished_directory_is_reused(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", "llama-2kv")
    weights = path / "model.safetensors"
    before = weights.stat().st_ino
    assert make_tiny_model(path, "llama-2kv") == path
    assert weights.stat().st_ino == before
    make_tiny_model(path, "llama-2kv", seed=3)
    assert weights.stat().st_ino != before


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a tiny model"):
        make_tiny_model(tmp_path, "llama-2kv")
    assert not (tmp_path / MARKER).exists()
    with pytest.raises(ValueError, match="kind='nope'"):
        make_tiny_model(tmp_path / "x", "nope")


def test_global_generator_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    make_tiny_model(tmp_path / "m", "qwen2")
    assert torch.equal(torch.rand(3), want)


def test_requests_cover_the_cases() -> None:
    requests = build_requests()
    assert len(requests) >= 17
    assert sum(r.concurrent for r in requests) == 8
    assert len({r.name for r in requests}) == len(requests)
    assert requests == build_requests()
    lengths = {len(r.ids) for r in requests}
    assert 1 in lengths and any(n % 8 == 0 for n in lengths)
    assert any(n % 2 and n % 4 and n % 8 for n in lengths)
    assert max(r.max_new_tokens for r in requests) >= 64


def test_cached_decode_agrees_with_recomputing(tmp_path: Path) -> None:
    """The oracle itself: decode through its cache against one full forward."""
    path = make_tiny_model(tmp_path / "m", "mla-moe")
    request = build_requests()[5]
    [reply] = hf_reference(path, [request])
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.tensor([[*request.ids, *reply.ids]])
    with torch.inference_mode():
        scores = model(ids).logits[0].log_softmax(-1)
    for step, (token, logprob) in enumerate(zip(reply.ids, reply.logprobs)):
        row = scores[len(request.ids) + step - 1]
        assert int(row.argmax()) == token
        assert abs(float(row[token]) - logprob) < 1e-4


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
