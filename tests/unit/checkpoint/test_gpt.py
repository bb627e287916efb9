"""What a GPTModel can be, and what is refused by name; the models themselves are in `distributed/test_gpt.py`."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import gpt, layout
from megatron_ext.checkpoint.blocks import DiskFile
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.checkpoint.writer import PATTERN, CheckpointWriter, writing
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.presets import PRESETS

ARCH = replace(PRESETS["tiny-transformer"].architecture, pattern="*-*-*-", hidden_size=16, padded_vocab_size=32)


def save(path: Path, arch: Architecture = ARCH, form: bool = True, **args: object) -> Path:
    shapes = gpt.tensors(arch) if form else axes.tensors(arch)
    with writing(path, arch, Namespace(), gpt.GPT if form else PATTERN) as writer:
        for number, (key, shape) in enumerate(shapes.items()):
            writer.write(key, torch.full(shape, float(number)))
    if args:
        rewrite(path / layout.RELEASE, args)
    return path


def rewrite(step: Path, args: dict[str, object]) -> None:
    """Put other arguments into a step, as a file of older versions, which is read first."""
    values = layout.common(step)
    vars(values["args"]).update(args)
    torch.save(values, step / "common.pt")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"softmax_type": "off-by-one"}, "--softmax-type"),
        ({"num_layers": None}, "does not say which model"),
        ({"hybrid_layer_pattern": "*-"}, "pattern form already"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type: learned positions"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0, "position_embedding_type": "rope"}, "default RoPE"),
        ({"num_layers": 2}, r"\(3, .*\) instead of \(2, "),
    ],
)
def test_other_models_are_refused_by_the_argument(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    source = save(tmp_path / "gpt", **args)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        gpt.to_pattern(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "M-*-"}, "layer pattern"),
        ({"pattern": "*-*"}, "layer pattern"),
        ({"layer_sizes": {"ffn_hidden_size": (8, 16, 24)}}, "differ from layer to layer"),
        ({"rope_scaling_factor": 32.0}, "default RoPE scaling"),
    ],
)
def test_what_no_gpt_model_is(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    source = save(tmp_path / "pattern", replace(ARCH, **changes), form=False)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        gpt.to_gpt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_layer_is_read_of_a_stack(tmp_path: Path) -> None:
    with DiskFile(tmp_path / "__0_0.distcp") as file:
        writer = CheckpointWriter(tmp_path, file)
        layers = torch.arange(24.0).view(3, 4, 2)
        for layer in (2, 0, 1):
            writer.write("w", layers[layer], (layer, 3))
        with pytest.raises(CheckpointError, match="written twice"):
            writer.write("w", layers[0], (0, 3))
        writer.finish({})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.read("w"), layers)
    assert all(torch.equal(reader.read("w", layer=layer), layers[layer]) for layer in range(3))


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    with DiskFile(tmp_path / "__0_0.distcp") as file:
        writer = CheckpointWriter(tmp_path, file)
        writer.write("w", torch.ones(4), (0, 2))
        writer.finish({})
    with pytest.raises(CheckpointError, match="'w' is not whole"):
        CheckpointReader(tmp_path).read("w", layer=1)


def test_arguments_of_older_versions_mean_what_they_meant(tmp_path: Path) -> None:
    source = save(tmp_path / "gpt")
    step = source / layout.RELEASE
    values = layout.common(step)
    for name in ("quick_geglu", "squared_relu", "mamba_num_heads", "use_rope_scaling", "add_qkv_bias"):
        vars(values["args"]).pop(name, None)
    torch.save(values, step / "common.pt")
    assert replace(gpt.architecture(step), mamba_num_heads=ARCH.mamba_num_heads) == ARCH
