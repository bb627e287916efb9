"""Weights to begin with, of a published file; features are those of the classifier, normalised."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vision_oracle import SMALL, published_state

from megatron_ext.errors import CheckpointError
from megatron_ext.vision.downstream.backbone import Backbone, begin_with, read_backbone
from megatron_ext.vision.network import Network
from megatron_ext.vision.weights import from_published


def test_features_are_those_of_the_published_weights(tmp_path: Path) -> None:
    """At another resolution and with other windows, too, which have no weights."""
    model = replace(SMALL, classes=1000)
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in published_state(model).items()
    }
    torch.save(state, tmp_path / "published.pth")
    ours = replace(model, classes=7, resolution=32, drop_path=0.5, window=8)
    network = Network(ours).eval()
    backbone = Backbone(ours).eval()
    weights = read_backbone(tmp_path / "published.pth", ours)
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.startswith("norms.") for name in missing)
    network.load_state_dict({n: v for n, v in from_published(state, model).items() if "head" not in n}, strict=False)
    images = torch.randn(2, 3, 64, 64)
    for found, expected in zip(backbone(images), network.forward_features(images), strict=True):
        torch.testing.assert_close(found, expected / (1 + 1e-5) ** 0.5)
    network = torch.nn.Module()
    network.backbone = Backbone(ours)  # as the second of two tensor-parallel ranks
    network.backbone.linears = SimpleNamespace(size=2, rank=1)  # type: ignore[assignment]
    name = "stages.2.blocks.0.mixer.out_proj.weight"
    layer: Any = network.backbone.get_submodule(name.removesuffix(".weight"))
    layer.weight = torch.nn.Parameter(layer.weight[:, 16:].clone())
    layer.weight.tensor_model_parallel, layer.weight.partition_dim = True, 1
    begin_with(tmp_path / "published.pth", ours)([SimpleNamespace(network=network)])
    state = network.backbone.state_dict()
    assert torch.equal(state.pop(name), weights[name][:, 16:])
    assert all(torch.equal(value, weights[own]) for own, value in state.items() if own in weights)
    with pytest.raises(CheckpointError):
        read_backbone(tmp_path / "published.pth", replace(ours, dim=16))
