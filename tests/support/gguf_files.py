"""Small GGUF files, written by the `gguf` package alone, as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

KEYS = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
}  # fmt: skip
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "o r", "\u0120w or", "l d", "\u0120wor ld"]


def byte_level(rows: int = 300) -> dict[str, Any]:
    """A vocabulary of all bytes, a few merges and two marks; the rest is padding."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [
        "<|end|>",
        "<|turn|>",
        "<think>",
        *bytes_to_unicode().values(),
        *(merge.replace(" ", "") for merge in MERGES),
    ]
    types = [3, 3, 4, *[1] * (len(tokens) - 3)]
    padding = rows - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{number}]" for number in range(len(tokens), rows)],
        "tokenizer.ggml.token_type": types + [5] * padding, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for message in messages %}<|turn|>{{ message['content'] }}{% endfor %}",
    }  # fmt: skip


def sentencepiece(rows: int = 300) -> dict[str, Any]:
    """A vocabulary with scores: the better a token, the earlier it is made."""
    pieces = ["he", "ll", "hell", "\u2581w", "hello", "or", "\u2581wor", "\u2581hello", "\u2581world", "ld", "\u2581"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,!") - set(pieces))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters][:rows]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [float(-place) for place in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


def write(path: Path, arch: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """A file of this metadata (keys with `.` in front get the architecture's name) and these tensors, typed."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = arch + key if key.startswith(".") else key
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        stored = values if values.dtype == np.uint8 else gguf.quantize(values, number)
        writer.add_tensor(name, stored, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(arch: str, directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a directory that transformers wrote."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory).to_dict()
    metadata: dict[str, Any] = {f".{key}": config[hf] for hf, key in KEYS.items() if config.get(hf)}
    metadata[".attention.value_length"] = metadata[".rope.dimension_count"] = metadata.get(
        ".attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    metadata[".attention.layer_norm_rms_epsilon"] = config["rms_norm_eps"]
    metadata[".rope.freq_base"] = float(config["rope_parameters"]["rope_theta"])
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if "q_proj" in name or "k_proj" in name:
                tensor = paired(tensor, metadata[".attention.value_length"]) if arch == "llama" else tensor
            tensors[table.get_name(name, (".weight", ".bias"))] = tensor.float().numpy()
    return metadata, tensors


def paired(weight: Tensor, channels: int) -> Tensor:
    """Rows of a head in the order 0, d/2, 1, d/2 + 1, ...; (heads * d, ...)."""
    half = channels // 2
    order = [head + place for head in range(0, len(weight), channels) for c in range(half) for place in (c, half + c)]
    return weight[torch.tensor(order)]
