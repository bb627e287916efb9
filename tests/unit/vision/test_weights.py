"""The published layout: names and shapes of T, the round trip, and what does not fit."""

from pathlib import Path

import pytest
import torch
from vision_oracle import SMALL, published_shapes, published_state

from megatron_ext.errors import CheckpointError
from megatron_ext.vision.presets import PRESETS
from megatron_ext.vision.weights import from_published, load_published, to_published


@pytest.mark.parametrize("name", ["mambavision-t", "mambavision-l3"])
def test_every_published_name_has_its_place(name: str) -> None:
    """A state dict with the published names and shapes fills a network, nothing left over; and the way back."""
    shapes = published_shapes(PRESETS[name])
    weights = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "running" not in name)
    norms = sum(1 for name in shapes if name.endswith("num_batches_tracked"))
    assert weights - norms == PRESETS[name].num_parameters()
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours = from_published(state, PRESETS[name])
    back = {name: tuple(value.shape) for name, value in to_published(ours, PRESETS[name]).items()}
    assert back == shapes


def test_there_and_back() -> None:
    state = published_state(SMALL)
    back = to_published(from_published(state, SMALL), SMALL)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_a_file_of_a_trainer(tmp_path: Path) -> None:
    state = published_state(SMALL)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "model.pth.tar")
    found = load_published(tmp_path / "model.pth.tar", SMALL)
    assert all(torch.equal(found[name], value) for name, value in from_published(state, SMALL).items())
    (tmp_path / "broken").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="no checkpoint that can be read"):
        load_published(tmp_path / "broken", SMALL)


def test_what_does_not_fit_is_named() -> None:
    state = published_state(SMALL)
    without = {name: value for name, value in state.items() if name != "head.bias"}
    with pytest.raises(CheckpointError, match="lacks tensors"):
        from_published(without, SMALL)
    with pytest.raises(CheckpointError, match="does not have"):
        from_published(state | {"head.scale": torch.ones(1)}, SMALL)
    with pytest.raises(CheckpointError, match="other shapes"):
        from_published(state | {"head.bias": torch.ones(7)}, SMALL)
    state.pop("levels.2.blocks.0.mixer.conv1d_z.weight")
    with pytest.raises(CheckpointError, match="second convolution"):
        from_published(state, SMALL)
