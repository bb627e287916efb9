"""Types of weights: whatever they are, they come back bit for bit, and none is lost on the way into another."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_weights
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import writing
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import Architecture

ARCH = Architecture(
    pattern="M-*-", hidden_size=16, padded_vocab_size=40, max_position_embeddings=64, ffn_hidden_size=24,
    num_attention_heads=4, num_query_groups=2, kv_channels=8, mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=4,
    mamba_num_groups=2,
)  # fmt: skip
EXACT = ("A_log", ".D", "dt_bias")


def save(path: Path, dtype: torch.dtype, arch: Architecture = ARCH, **others: Tensor) -> Path:
    """A checkpoint of this type, its recurrence in float32; `others` by the end of their key."""
    with writing(path, arch, Namespace()) as writer:
        for key, weight in random_weights(arch).items():
            own = weight.to(torch.float32 if key.endswith(EXACT) else dtype)
            given = next((tensor for end, tensor in others.items() if key.endswith(end)), None)
            writer.write(key, own if given is None else given.expand(own.shape).contiguous())
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", ["M-*-", "*-*-", "MM"])
def test_every_type_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, pattern: str) -> None:
    rope = "rope" if pattern == "*-*-" else "none"
    arch = replace(ARCH, pattern=pattern, position_embedding_type=rope)
    source = save(tmp_path / "m", dtype, arch)
    to_hf(source, tmp_path / "hf", shard_bytes=4000)
    to_megatron(tmp_path / "hf", tmp_path / "back")
    old, new = CheckpointReader(source), CheckpointReader(tmp_path / "back")
    for key in old.shapes:
        left, right = old.read(key), new.read(key)
        assert left.dtype == right.dtype
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), key


def test_parts_of_one_tensor_take_the_type_that_holds_them_all(tmp_path: Path) -> None:
    """transformers has one input projection where Megatron has five weights."""
    fine: Any = torch.tensor(1 + 2**-20)
    source = save(tmp_path / "m", torch.bfloat16, **{"in_proj.weight.dt": fine})
    to_hf(source, tmp_path / "hf")
    projection = load_file(tmp_path / "hf" / "model.safetensors")["backbone.layers.0.mixer.in_proj.weight"]
    assert projection.dtype == torch.float32
    assert bool((projection[-ARCH.mamba_num_heads :] == fine).all())
    first = CheckpointReader(source).read("decoder.layers.0.mixer.in_proj.weight.z")
    assert torch.equal(projection[: len(first)], first.float())


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    large: Any = torch.tensor(1e5, dtype=torch.bfloat16)
    source = save(tmp_path / "m", torch.bfloat16, **{"linear_fc2.weight": large})
    to_hf(source, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"down_proj.weight does not fit into float16(.|\n)*up to 9.98e\+04"):
        to_hf(source, tmp_path / "no", dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"linear_fc2.weight does not fit(.|\n)*of .*down_proj.weight"):
        to_megatron(tmp_path / "hf", tmp_path / "no", dtype=torch.float16)
    assert not (tmp_path / "no").exists()
