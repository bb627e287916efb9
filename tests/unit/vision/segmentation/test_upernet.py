"""UPerNet: the published sizes, a plain formula of the head in evaluation, and laws."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vision_oracle import SMALL

from megatron_ext.errors import ConfigError
from megatron_ext.vision.downstream.family import WithHeads
from megatron_ext.vision.network import PLAIN
from megatron_ext.vision.segmentation.upernet import FAMILY, Classifier, ConvNorm, Segmenter, UperHead, UperNetSizes

# Table 3 of arXiv 2103.14030: UPerNet on Swin, millions of parameters, and the backbones without their classifiers.
SWIN = {"T": (96, 28.288 - 0.769, 60), "S": (96, 49.606 - 0.769, 81), "B": (128, 87.768 - 1.025, 121)}


@pytest.mark.parametrize("name", SWIN)
def test_the_heads_are_the_published_ones(name: str) -> None:
    """With the sizes that backbones are published with, on Swin's features they have Swin's published parameters."""
    width, backbone, published = SWIN[name]
    with torch.device("meta"):
        head = UperHead([width * 2**i for i in range(4)], 512, 150, 0.1)
        auxiliary = torch.nn.Sequential(ConvNorm(width * 4, 256, 3), Classifier(256, 150, 0.1))
    heads = sum(p.numel() for module in (head, auxiliary) for p in module.parameters()) / 1e6
    assert round(backbone + heads) == published


def test_parameters_on_our_backbones() -> None:
    """Not MambaVision's published ones, 55M, 84M and 126M: no one head has these on the published backbones."""
    found = {name: round(FAMILY.presets[f"mambavision-{name}"].num_parameters() / 1e6, 1) for name in "tsb"}
    assert found == {"t": 62.5, "s": 81.8, "b": 131.2}


def small(**heads: float) -> Segmenter:
    torch.manual_seed(0)
    model = WithHeads(replace(SMALL, classes=5), UperNetSizes(channels=6, auxiliary=4, **heads), lambda _: 0)  # type: ignore[arg-type]
    network = Segmenter(model, PLAIN).double()
    for module in network.modules():  # statistics and scales that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight, module.bias):
                torch.nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
    return network.eval()


def plain(features: list[Tensor], state: dict[str, Tensor]) -> Tensor:
    """The head by the paper's figure, level by level."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.0.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        mean, var, w, b = (
            state[f"{name}.1.{each}"][:, None, None] for each in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * w + b).clamp(min=0)

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear")

    last = features[3]
    means = []
    for i, bins in enumerate((1, 2, 3, 6)):
        height, width = last.shape[2:]
        rows = []
        for r in range(bins):
            row = []
            for c in range(bins):
                top, bottom = r * height // bins, -(-(r + 1) * height // bins)
                left, right = c * width // bins, -(-(c + 1) * width // bins)
                row.append(last[:, :, top:bottom, left:right].mean((2, 3)))
            rows.append(torch.stack(row, -1))
        means.append(up(conv(torch.stack(rows, -2), f"pooling.bins.{i}"), last))
    p5 = conv(torch.cat([last, *means], 1), "pooling.fuse")
    p4 = conv(features[2], "laterals.2") + up(p5, features[2])
    p3 = conv(features[1], "laterals.1") + up(p4, features[1])
    p2 = conv(features[0], "laterals.0") + up(p3, features[0])
    own = [conv(p, f"smooth.{i}") for i, p in enumerate((p2, p3, p4))]
    fused = conv(torch.cat([own[0], up(own[1], p2), up(own[2], p2), up(p5, p2)], 1), "fuse")
    return F.conv2d(fused, state["classify.1.weight"], state["classify.1.bias"])


def test_logits_are_those_of_a_plain_formula() -> None:
    network = small()
    features = [torch.randn(2, SMALL.channels(i), 16 >> i, 24 >> i, dtype=torch.float64) for i in range(4)]
    expected = plain(features, network.head.state_dict())
    torch.testing.assert_close(network.head(features), expected, rtol=1e-9, atol=1e-9)


def test_laws() -> None:
    """Images of a batch do not see each other in evaluation; the auxiliary head is there in training alone."""
    network, images = small(), torch.randn(3, 3, 64, 96, dtype=torch.float64)
    logits, nothing = network(images)
    assert logits.shape == (3, 5, 16, 24)
    assert nothing is None
    torch.testing.assert_close(network(images.flip(0))[0].flip(0), logits)
    logits, auxiliary = network.train()(images)
    assert auxiliary.shape == (3, 5, 4, 6)
    (logits.logsumexp(1).sum() + auxiliary.logsumexp(1).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="--upernet-channels is too small"):
        UperNetSizes(channels=0)
    with pytest.raises(ConfigError, match="--upernet-dropout is a share"):
        UperNetSizes(dropout=1.0)
