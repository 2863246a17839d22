"""A tiny Llama as a GGUF file whose weights are plain float16.

SGLang's kernels for quantized GGUF weights need a GPU. Its loader, which cuts the rows for
each rank, is the same for all types of weights, and float16 needs no kernel.
"""

from __future__ import annotations

import json
from pathlib import Path

NAME = "model-f16.gguf"


def write_gguf(model: Path) -> Path:
    """Write the checkpoint in folder `model` again, as a file beside it. Returns the path.

    Q and K keep the row order of transformers: SGLang reads them as they are.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    path = model / NAME
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(model / "model.safetensors", "np") as weights:
        for name in weights.keys():
            theirs = names.get_name(name, try_suffixes=(".weight",))
            assert theirs, name
            weight = weights.get_tensor(name)
            # Norms stay in float32, as in any GGUF file.
            writer.add_tensor(
                theirs, weight.astype("f2") if weight.ndim > 1 else weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
