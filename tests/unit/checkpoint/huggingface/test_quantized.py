"""Weights in float8 with a scale for each block are read as the numbers that they stand for; others are refused."""

import json
from pathlib import Path

import pytest
import torch
from hf_directories import edit, rewrite, tensors

from megatron_ext.checkpoint.huggingface import quantized
from megatron_ext.checkpoint.huggingface.convert import to_hf, to_megatron
from megatron_ext.errors import CheckpointError

BLOCKS = (5, 7)
FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCKS), "activation_scheme": "dynamic", "fmt": "e4m3"}


def quantize(directory: Path) -> dict[str, torch.Tensor]:
    """Store the projections of layers in 8 bits; returns every number that is meant."""
    meant: dict[str, torch.Tensor] = {}

    def change(held: dict[str, torch.Tensor]) -> None:
        for key, value in list(held.items()):
            meant[key] = value.bfloat16()
            held[key] = value.bfloat16()
            if not key.endswith("proj.weight"):
                continue
            high, wide = ((size + block - 1) // block for size, block in zip(value.shape, BLOCKS, strict=True))
            scales = torch.rand(high, wide, generator=torch.Generator().manual_seed(1)) + 0.5
            stored = torch.empty(value.shape, dtype=torch.float8_e4m3fn)
            exact = torch.empty(value.shape)
            for row in range(value.shape[0]):
                for column in range(value.shape[1]):
                    scale = scales[row // BLOCKS[0], column // BLOCKS[1]]
                    stored[row, column] = (value[row, column].float() / scale).to(torch.float8_e4m3fn)
                    exact[row, column] = stored[row, column].float() * scale
            held[key], held[key + "_scale_inv"], meant[key] = stored, scales, exact.bfloat16()

    rewrite(directory, change)
    edit(directory, quantization_config=FP8)
    return meant


@pytest.mark.parametrize("at_a_time", [1, 2**24])
def test_blocks_of_eight_bits_are_multiplied_by_their_scales(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int
) -> None:
    monkeypatch.setattr(quantized, "_ROWS_AT_A_TIME", at_a_time)
    meant = quantize(hf)
    to_megatron(hf, tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    back = tensors(tmp_path / "back")
    assert back.keys() == meant.keys()
    assert all(torch.equal(back[key], value) for key, value in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "weight_block_size": None},
        "awq",
    ],
)
def test_other_quantizations_are_refused_by_name(hf: Path, tmp_path: Path, entry: object) -> None:
    edit(hf, quantization_config=entry)
    with pytest.raises(CheckpointError, match="quantized in this way are not read"):
        to_megatron(hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_without_its_scales_is_named(hf: Path, tmp_path: Path) -> None:
    quantize(hf)
    rewrite(hf, lambda held: held.pop("model.layers.1.mlp.up_proj.weight_scale_inv"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has not one scale"):
        to_megatron(hf, tmp_path / "out")
