"""Tiny random-weight checkpoints that need no download, for the demo and for tests.

A checkpoint is a complete Hugging Face directory: float32 safetensors, a config, and a
tokenizer whose id for a byte is that byte. With a standard deviation of 0.12 in the
weights, two logits are seldom close, so equal greedy tokens prove something. The output
layer can produce only printable ASCII. So text shows on any terminal, one character is
one token, and no end-of-text id ends a request early.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_dcp.demo.tiny_kinds import KINDS, TinyModel

VOCAB_SIZE = 320
CONTEXT_LENGTH = 8192
MARKER = "tiny_model.json"
# Raise it when the same kind and seed start to give other files.
FORMAT_VERSION = 1

_PRINTABLE = range(0x20, 0x7F)
_NAMED_SPECIALS = "<|bos|> <|eos|> <|pad|> <|unk|> <|user|> <|assistant|>".split()
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(path: str | Path, kind: str, *, seed: int = 0) -> Path:
    """Write the checkpoint of ``kind`` at ``path`` and return the path.

    The same kind and seed give the same bytes. A directory that holds them already is
    kept. One that was made from another specification is replaced.

    Raises
    ------
    ValueError
        The kind is unknown.
    FileExistsError
        This function did not make the directory at ``path``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return make_model(path, kind, KINDS[kind], seed=seed)


def make_model(path: str | Path, kind: str, spec: TinyModel, *, seed: int = 0) -> Path:
    """Do what `make_tiny_model` does, for a specification of the caller's own."""
    path = Path(path)
    mark = _marker(kind, spec, seed)
    if path.exists():
        found = path / MARKER
        if not found.is_file():
            raise FileExistsError(f"{path} exists and is not a tiny model; remove it")
        if json.loads(found.read_text()) == mark:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Built beside the target and renamed, so that a killed run leaves nothing half made.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tiny-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        _write_model(fresh, spec, seed)
        _write_tokenizer(fresh)
        (fresh / MARKER).write_text(json.dumps(mark, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)
        os.replace(fresh, path)
    return path


def _marker(kind: str, spec: TinyModel, seed: int) -> dict[str, Any]:
    text = json.dumps([FORMAT_VERSION, asdict(spec), seed], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"kind": kind, "seed": seed, "spec_sha256": digest}


def _write_model(path: Path, spec: TinyModel, seed: int) -> None:
    import torch
    import transformers

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **spec.sizes,
    }
    config = getattr(transformers, spec.config_class)(**sizes)
    # transformers draws initial weights from the global generator, which must not change.
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, spec.architecture)(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + spec.norm_std * noise)
            else:
                weight.copy_(spec.weight_std * noise)
        if not sizes["tie_word_embeddings"]:
            head = model.get_output_embeddings().weight
            head[: _PRINTABLE.start] = 0
            head[_PRINTABLE.stop :] = 0
    with _no_progress_bar():
        model.save_pretrained(path)
    _add_config_keys(path / "config.json", spec.extra)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _add_config_keys(file: Path, extra: Mapping[str, Any]) -> None:
    content = json.loads(file.read_text())
    content.update(extra)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = [*_NAMED_SPECIALS]
    specials += [f"<|extra_{i}|>" for i in range(VOCAB_SIZE - 256 - len(specials))]
    vocab = {char: byte for byte, char in _byte_symbols()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in specials]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[0],
        "eos_token": specials[1],
        "pad_token": specials[2],
        # Without it, Qwen2's tokenizer class adds a token outside of the vocabulary.
        "unk_token": specials[3],
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_symbols() -> Iterator[tuple[int, str]]:
    """Yield each byte with the character that ByteLevel shows for it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (byte for byte in range(256) if byte not in shown)
    yield from ((byte, chr(byte)) for byte in shown)
    yield from ((byte, chr(0x100 + i)) for i, byte in enumerate(hidden))
