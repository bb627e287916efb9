"""A parameter and its AdamW go through a file as if nothing had happened."""

from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.parameters import read_parameter, write_parameter
from megatron_ext.errors import CheckpointError


def train(weight: torch.nn.Parameter, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        weight.grad = torch.sin(weight.detach() * (step + 1))
        optimizer.step()


def new(rows: int = 3) -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(rows, -1).clone())
    return weight, torch.optim.AdamW([weight], lr=0.1)


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    expected, optimizer = new()
    train(expected, optimizer, range(3))
    write_parameter(tmp_path / "a" / "weight.safetensors", expected, optimizer.state[expected])
    train(expected, optimizer, range(3, 6))
    found, other = new()
    other.state[found] = read_parameter(tmp_path / "a" / "weight.safetensors", found)
    train(found, other, range(3, 6))
    assert torch.equal(found, expected)


def test_another_shape_is_told(tmp_path: Path) -> None:
    weight, optimizer = new()
    train(weight, optimizer, range(1))
    write_parameter(tmp_path / "weight.safetensors", weight, optimizer.state[weight])
    with pytest.raises(CheckpointError, match=r"another shape\n.*weight.safetensors: \[3, 4\]\n.*\[4, 3\]"):
        read_parameter(tmp_path / "weight.safetensors", new(rows=4)[0])
    with pytest.raises(FileNotFoundError):
        read_parameter(tmp_path / "nothing.safetensors", weight)
