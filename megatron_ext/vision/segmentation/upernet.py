"""UPerNet (Xiao et al., arXiv 1807.10221): pyramid pooling on the smallest feature, a feature pyramid on the others.

With the auxiliary head on the third feature and the sizes with which backbones are published: 512 channels, bins of 1,
2, 3 and 6, dropout of .1.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from megatron_ext.errors import ConfigError
from megatron_ext.options.fields import option
from megatron_ext.vision.blocks import BatchNorm
from megatron_ext.vision.downstream.backbone import Backbone
from megatron_ext.vision.downstream.family import HeadsFamily, WithHeads
from megatron_ext.vision.linears import Linears
from megatron_ext.vision.presets import PRESETS

BINS = (1, 2, 3, 6)
AUXILIARY = 2  # the feature that the auxiliary head reads


@dataclass(frozen=True)
class UperNetSizes:
    """Sizes of UPerNet's heads."""

    channels: int = option(512, "Channels of the pyramid.")
    auxiliary: int = option(256, "Channels of the auxiliary head.")
    dropout: float = option(0.1, "Share of channels that are left out before pixels are classified.")

    def __post_init__(self) -> None:
        """Find what cannot be built.

        Raises:
            ConfigError: Says what.
        """
        for name in ("channels", "auxiliary"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--upernet-{name} is too small", got=getattr(self, name), legal="at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError("--upernet-dropout is a share", got=self.dropout, legal="0 to less than 1")


class ConvNorm(nn.Sequential):
    """A convolution, a norm over the batch, and what is positive of it."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), BatchNorm(outputs), nn.ReLU()
        )


def resized(x: Float[Tensor, "b c _ _"], size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Bilinear, with pixels as squares."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """What is in the whole image, in halves, thirds and sixths of it, beside each pixel."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.bins = nn.ModuleList(ConvNorm(inputs, channels, 1) for _ in BINS)
        self.fuse = ConvNorm(inputs + len(BINS) * channels, channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """As large as x."""
        size = (x.shape[2], x.shape[3])
        pooled = [
            resized(convolve(F.adaptive_avg_pool2d(x, count)), size)
            for convolve, count in zip(self.bins, BINS, strict=True)
        ]
        return self.fuse(torch.cat([x, *pooled], 1))


class Classifier(nn.Sequential):
    """Channels left out, and a class for each pixel."""

    def __init__(self, inputs: int, classes: int, dropout: float) -> None:
        last = nn.Conv2d(inputs, classes, 1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        super().__init__(nn.Dropout2d(dropout), last)


class UperHead(nn.Module):
    """Four features to logits at the stride of the first.

    Args:
        inputs: Channels of the features.
        channels: Of the pyramid.
        classes: Of pixels.
        dropout: The share of channels.
    """

    def __init__(self, inputs: list[int], channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.pooling = PyramidPooling(inputs[-1], channels)
        self.laterals = nn.ModuleList(ConvNorm(each, channels, 1) for each in inputs[:-1])
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in inputs[:-1])
        self.fuse = ConvNorm(len(inputs) * channels, channels, 3)
        self.classify = Classifier(channels, classes, dropout)

    def forward(self, features: list[Tensor]) -> Float[Tensor, "b classes h w"]:
        """Logits."""
        levels = [lateral(x) for lateral, x in zip(self.laterals, features, strict=False)]
        levels.append(self.pooling(features[-1]))
        for index in range(len(levels) - 1, 0, -1):
            above = levels[index - 1]
            levels[index - 1] = above + resized(levels[index], (above.shape[2], above.shape[3]))
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)] + levels[-1:]
        size = (levels[0].shape[2], levels[0].shape[3])
        return self.classify(self.fuse(torch.cat([levels[0], *(resized(x, size) for x in levels[1:])], 1)))


class Segmenter(nn.Module):
    """A backbone, UPerNet's head, and in training the auxiliary one.

    Args:
        model: Backbone and sizes of the heads.
        linears: How the backbone's linear layers are made.
    """

    def __init__(self, model: WithHeads, linears: Linears) -> None:
        super().__init__()
        backbone, heads = model.backbone, model.heads
        inputs = [backbone.channels(index) for index in range(4)]
        self.backbone = Backbone(backbone, linears)
        self.head = UperHead(inputs, heads.channels, backbone.classes, heads.dropout)
        self.auxiliary = nn.Sequential(
            ConvNorm(inputs[AUXILIARY], heads.auxiliary, 3),
            Classifier(heads.auxiliary, backbone.classes, heads.dropout),
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """Logits at strides 4 and, in training, 16; None in evaluation."""
        features = self.backbone(images)
        return self.head(features), self.auxiliary(features[AUXILIARY]) if self.training else None


def make(model: WithHeads, linears: Linears) -> Segmenter:
    """The network of a description."""
    return Segmenter(model, linears)


# ADE20K's classes, and the side of the images that networks are published with.
FAMILY = HeadsFamily("upernet", UperNetSizes, make, dict(PRESETS), {"classes": 150, "resolution": 512})


def predict(network: Any, image: Tensor, size: tuple[int, int]) -> Float[Tensor, "classes h w"]:
    """Logits of one normalised image (1, c, _, _) at another size."""
    return resized(network(image)[0].float(), size)[0]
