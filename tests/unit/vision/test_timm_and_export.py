"""Under timm's names, and as a graph of standard operators."""

from dataclasses import replace

import pytest
import timm
import torch
from vision_oracle import SMALL

from megatron_ext.errors import ConfigError
from megatron_ext.vision.network import Network


def test_timm_creates_it() -> None:
    from timm.optim import param_groups_layer_decay

    from megatron_ext.vision import timm_models

    assert set(timm_models.NAMES) <= set(timm.list_models("mambavision*"))
    images = torch.randn(2, 1, 48, 48)
    model = timm.create_model("mambavision_nano", num_classes=7, in_chans=1, drop_path_rate=0.1).eval()
    assert model(images).shape == (2, 7)
    assert model.forward_head(model.forward_features(images)[-1], pre_logits=True).shape == (2, model.num_features)
    features = timm.create_model("mambavision_nano", features_only=True, in_chans=1)
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert [f.shape[1:] for f in features(images)] == [(16, 12, 12), (32, 6, 6), (64, 3, 3), (128, 2, 2)]
    two = timm.create_model("mambavision_nano", features_only=True, in_chans=1, out_indices=(1, 3))
    assert two.feature_info.channels() == [32, 128]
    assert timm.create_model("mambavision_nano", num_classes=0)(images.expand(-1, 3, -1, -1)).shape == (2, 128)
    with torch.device("meta"):
        assert timm.create_model("mambavision_tiny").model.num_parameters() == 31_794_248
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    with pytest.raises(ConfigError, match="no weights to download"):
        timm.create_model("mambavision_tiny", pretrained=True)
    with pytest.raises(ConfigError, match="no such option"):
        timm.create_model("mambavision_nano", widht=3)


def test_exported_graphs_are_the_network() -> None:
    """For any number of images, at a size that windows do not divide; no operator of ours in the graph."""
    network = Network(replace(SMALL, pattern="C/C/MS/M")).eval()
    for module in network.modules():  # decays that differ, so that the scan matters
        if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
            torch.nn.init.normal_(bias)
    images = torch.randn(3, 3, 40, 56)
    with torch.no_grad():
        expected = network(images)
        program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim("images")},))
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)
    names = {node.target._schema.name for node in program.graph.nodes if hasattr(node.target, "_schema")}
    assert all(name.startswith("aten::") for name in names)
