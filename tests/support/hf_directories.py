"""Small models as directories of Hugging Face's, and how tests change them."""

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_models import random_weights
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint import checksums
from megatron_ext.checkpoint.writer import writing
from megatron_ext.models.architecture import Architecture

ARCH = Architecture(
    pattern="*-*-", hidden_size=16, padded_vocab_size=40, max_position_embeddings=64, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=8, position_embedding_type="rope",
    rotary_base=500_000, rope_scaling_factor=8.0,
)  # fmt: skip
MAMBA = replace(
    ARCH, pattern="MM", position_embedding_type="none", mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=4,
    mamba_num_groups=2,
)  # fmt: skip
HYBRID = replace(MAMBA, pattern="M*")


def checkpoint(path: Path, arch: Architecture = ARCH, dtype: torch.dtype = torch.bfloat16) -> Path:
    with writing(path, arch, Namespace(seq_length=64)) as writer:
        for key, tensor in random_weights(arch).items():
            writer.write(key, tensor.to(torch.float32 if key.endswith(("A_log", ".D")) else dtype))
    return path


def edit(directory: Path, **entries: Any) -> None:
    (directory / checksums.FILE).unlink(missing_ok=True)  # as if it were of others
    path = directory / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in shards(directory) for key, value in load_file(path).items()}


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """All tensors in one file, after `change(tensors)`."""
    held = tensors(directory)
    change(held)
    for path in [*shards(directory), directory / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(held, directory / "model.safetensors")
